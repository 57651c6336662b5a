"""`rcmstr read IMAGE...`: text of word images."""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from rcmstr_fast.config import ConfigError, DataConfig

NAME = "read"
HELP = "print file, text and confidence of word images"


def add_arguments(parser: ArgumentParser) -> None:
    """Images, the recogniser, and where to run it."""
    parser.add_argument("images", nargs="+", help="pictures, each of one word")
    parser.add_argument("--recogniser", required=True, help="recogniser.safetensors of a probe, or its run folder")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto, cpu or cuda")
    parser.add_argument("--batch_size", type=int, default=256, help="words a forward pass")


def run(arguments: Namespace) -> int:
    """Print a line `file TAB text TAB confidence` for each picture.

    Returns:
        0, or 1 where a picture could not be read (it is named on standard error, and has no line).
    """
    from rcmstr_fast.data.decode import decode_batch
    from rcmstr_fast.evaluation.recogniser import load_recogniser
    from rcmstr_fast.train.distributed import choose_device

    if arguments.batch_size < 1:
        raise ConfigError(f"batch_size must be 1 or more, got {arguments.batch_size}")
    recogniser, _ = load_recogniser(arguments.recogniser)
    recogniser.to(choose_device(arguments.device, 0))
    limits, failed = DataConfig(), False
    for first in range(0, len(arguments.images), arguments.batch_size):
        files = arguments.images[first : first + arguments.batch_size]
        pictures, broken = decode_batch(
            [_contents(file) for file in files],
            *recogniser.size,
            max_pixels=limits.max_pixels,
            min_side=limits.min_side,
            rotate=recogniser.rotate,
        )
        for i, reason in broken.items():
            failed = True
            print(f"rcmstr read: {files[i]}: {reason}", file=sys.stderr)
        good = [i for i in range(len(files)) if i not in broken]
        for i, (text, confidence) in zip(good, zip(*recogniser.read_images(pictures[good]))):
            print(f"{files[i]}\t{text}\t{confidence:.4f}")
    return int(failed)


def _contents(file: str) -> bytes | None:
    try:
        return Path(file).read_bytes()
    except OSError:
        return None
