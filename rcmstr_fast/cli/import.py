"""`rcmstr import FILE --from PROJECT --out encoder.safetensors`: other projects' encoders for our protocols."""

from jsonargparse import Namespace

from rcmstr_fast.cli.arguments import Parser
from rcmstr_fast.fields import Bounds

NAME = "import"
HELP = "take an encoder of DTRB, RCLSTR, DiG, timm or MoCo, with its rectifier; no code is run from the file"


def add_arguments(parser: Parser) -> None:
    """The file, whose it is, and where to."""
    parser.add_argument("file", help="safetensors or torch checkpoint (.pth, .pt, .tar, .ckpt)")
    parser.add_argument(
        "--from",
        dest="project",
        required=True,
        choices=["dtrb", "rclstr", "dig", "timm", "moco"],
        help="the project whose names the file has",
    )
    parser.add_argument("--out", type=str, required=True, help="encoder.safetensors to write")
    parser.add_argument(
        "--part",
        choices=["encoder", "rectifier"],
        default="encoder",
        help="rectifier: that alone, for model.tps_checkpoint",
    )
    parser.add_argument(
        "--tps", choices=["frozen", "trainable"], default="frozen", help="what later training does with the rectifier"
    )
    parser.add_argument(
        "--image_width",
        type=int,
        default=0,
        bounds=Bounds(low=0, high=4096),
        help="pixels; 0: as the file says, else 100 or 128",
    )
    parser.add_argument(
        "--sequence", action="store_true", help="DTRB's LSTM layers become part of the encoder (model.sequence=bilstm)"
    )


def run(arguments: Namespace) -> int:
    """Write the encoder and list what was mapped, left out and missing."""
    from rcmstr_fast.exchange.importing import import_encoder

    made = import_encoder(
        arguments.file,
        arguments.project,
        arguments.out,
        part=arguments.part,
        tps=arguments.tps,
        image_width=arguments.image_width,
        sequence=arguments.sequence,
    )
    print(f"{arguments.out}: {made.describe()}")
    return 0
