"""`rcmstr embed PICTURES...`: features of an encoder, with names and labels, as safetensors, npz or Parquet."""

import sys
import time

from jsonargparse import Namespace

from rcmstr_fast.cli.arguments import Parser
from rcmstr_fast.fields import Bounds

NAME = "embed"
HELP = "write an encoder's features of pictures to a .safetensors, .npz or .parquet file"


def add_arguments(parser: Parser) -> None:
    """Images, the encoder, where to write, and what of each picture."""
    parser.add_argument(
        "images",
        nargs="+",
        help="pictures of one word each: files, folders, LMDBs, patterns, or - for file names on standard input",
    )
    parser.add_argument(
        "--encoder", required=True, help="run folder of a pretraining or a probe, or the .safetensors file in it"
    )
    parser.add_argument("--out", required=True, help="file to write: .safetensors, .npz or .parquet")
    parser.add_argument(
        "--levels",
        type=list[str],
        default=["word"],
        help="what of each picture: word (mean of the frames), subword, frame, token; several make several columns",
    )
    parser.words = ("--levels",)
    parser.add_argument(
        "--num_subwords", type=int, default=4, bounds=Bounds(low=1), help="windows of the level subword"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "float16"], default="float32", help="of the features in the file"
    )
    parser.add_argument("--batch_size", type=int, default=256, bounds=Bounds(low=1), help="pictures a forward pass")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the encoder")


def run(arguments: Namespace) -> int:
    """Embed every picture; broken ones are named on standard error and are not in the file.

    Returns:
        0, or 1 where a picture could not be read.
    """
    from rcmstr_fast.exchange.embed import embed

    began = time.monotonic()
    done = embed(
        arguments.images,
        arguments.encoder,
        arguments.out,
        levels=arguments.levels,
        num_subwords=arguments.num_subwords,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        device=arguments.device,
        precision=arguments.precision,
    )
    for name, reason in done.broken.items():
        print(f"rcmstr embed: {name}: {reason}", file=sys.stderr)
    seconds = max(time.monotonic() - began, 1e-9)
    left_out = f", {len(done.broken)} left out" if done.broken else ""
    print(
        f"rcmstr embed: {done.written} pictures in {seconds:.1f} s, {done.written / seconds:.0f} pictures/s{left_out}, "
        f"{arguments.out}",
        file=sys.stderr,
    )
    return int(bool(done.broken))
