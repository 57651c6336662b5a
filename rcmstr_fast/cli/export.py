"""`rcmstr export RUN --format F --out FILE`: weights for other programs, with a model card."""

from jsonargparse import ArgumentParser, Namespace

NAME = "export"
HELP = "write an encoder or recogniser for timm, DTRB, PARSeq, OpenOCR, ONNX or TorchScript, with a model card"


def add_arguments(parser: ArgumentParser) -> None:
    """What, as what, and where to."""
    parser.add_argument("run", help="run folder, encoder.safetensors or recogniser.safetensors")
    parser.add_argument(
        "--format",
        required=True,
        choices=["timm", "dtrb", "parseq", "openocr", "onnx", "torchscript", "safetensors"],
        help="whose; timm, parseq and openocr hold vision transformers, dtrb the ResNet, the others everything",
    )
    parser.add_argument(
        "--out",
        type=str,
        required=True,
        help="file to write (.safetensors or .pth; .onnx; .pt); the card goes beside it, with the ending .md",
    )
    parser.add_argument(
        "--part",
        choices=["auto", "encoder", "recogniser"],
        default="auto",
        help="encoder: leave the decoder of a recogniser behind; auto: what is there",
    )
    parser.add_argument(
        "--calibrate",
        type=str,
        nargs="+",
        default=[],
        help="folders or LMDBs of labelled words, or val (the run's own): confidences are calibrated on them",
    )
    parser.add_argument("--licence", type=str, default="", help="of the weights, for the card")


def run(arguments: Namespace) -> int:
    """Write the file and its card, and name both."""
    from rcmstr_fast.exchange.export import export

    file, card = export(
        arguments.run,
        arguments.format,
        arguments.out,
        part=arguments.part,
        named=arguments.calibrate,
        licence=arguments.licence,
    )
    print(f"{file}\n{card}")
    return 0
