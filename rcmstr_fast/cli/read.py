"""`rcmstr read PICTURES...`: text of word images, as lines, CSV, JSON lines or labels.tsv."""

import contextlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TextIO

from jsonargparse import Namespace

from rcmstr_fast.cli.arguments import Parser
from rcmstr_fast.config import DataConfig
from rcmstr_fast.fields import Bounds

if TYPE_CHECKING:
    import numpy as np

    from rcmstr_fast.exchange.inputs import Inputs
    from rcmstr_fast.exchange.lexicon import Lexicon
    from rcmstr_fast.exchange.reading import Reader
    from rcmstr_fast.exchange.tables import Table

    Decoded = tuple[list[str], "np.ndarray", dict[int, str]]

NAME = "read"
HELP = "read word images: a line, CSV row or JSON object a picture"


def add_arguments(parser: Parser) -> None:
    """Images, the recogniser, where to write, and how to read."""
    parser.add_argument(
        "images",
        nargs="+",
        help="pictures of one word each: files, folders, LMDBs, patterns, or - for file names on standard input",
    )
    parser.add_argument("--recogniser", required=True, help="recogniser.safetensors of a probe, or its run folder")
    parser.add_argument("--out", type=str, default="", help="file to write; standard output if not given")
    parser.add_argument(
        "--format",
        choices=["auto", "text", "csv", "jsonl", "labels"],
        default="auto",
        help="auto: by the ending of --out (.txt .csv .jsonl .tsv), text without it; labels: file, tab, text",
    )
    parser.add_argument(
        "--charset", type=str, default="", help="36, 62, 94 or a file: only these characters are written"
    )
    parser.add_argument(
        "--lexicon", type=str, default="", help="UTF-8 file, a word a line: the nearest one is the text"
    )
    parser.add_argument(
        "--calibrate",
        type=str,
        nargs="+",
        default=[],
        help="folders or LMDBs of labelled words, or val (the run's own): confidences are calibrated on them first",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="auto: the one it was trained and tested in; bf16 is several times faster where the hardware has it",
    )
    parser.add_argument("--batch_size", type=int, default=256, bounds=Bounds(low=1), help="words a forward pass")


def run(arguments: Namespace) -> int:
    """Read every picture; broken ones are named on standard error and have no line.

    Returns:
        0, or 1 where a picture could not be read.
    """
    from rcmstr_fast.charset import Charset
    from rcmstr_fast.exchange.inputs import open_inputs
    from rcmstr_fast.exchange.lexicon import Lexicon
    from rcmstr_fast.exchange.reading import Reader
    from rcmstr_fast.exchange.tables import Table, format_of

    kind = format_of(arguments.format, arguments.out)
    reader = Reader.load(arguments.recogniser, device=arguments.device, precision=arguments.precision)
    if arguments.charset:
        reader.restrict(Charset.load(arguments.charset))
    fold = not any(c.isupper() for c in reader.recogniser.charset.characters)
    lexicon = Lexicon.load(arguments.lexicon, fold=fold) if arguments.lexicon else None
    inputs = open_inputs(arguments.images)
    if arguments.calibrate:
        _calibrate(reader, arguments)
    with _opened(arguments.out) as file:
        return _read_all(reader, inputs, Table(file, kind, lexicon=lexicon is not None), lexicon, arguments.batch_size)


def _calibrate(reader: "Reader", arguments: Namespace) -> None:
    from rcmstr_fast.exchange.calibrate import calibrate, validation_words

    made = calibrate(reader, *validation_words(arguments.recogniser, arguments.calibrate))
    print(f"rcmstr read: {made.describe()}", file=sys.stderr)


@contextlib.contextmanager
def _opened(out: str) -> Iterator[TextIO]:
    if not out:
        yield sys.stdout
        return
    with open(out, "w", encoding="utf-8", newline="") as file:
        yield file


def _read_all(reader: "Reader", inputs: "Inputs", table: "Table", lexicon: "Lexicon | None", batch_size: int) -> int:
    from rcmstr_fast.data.progress import progress

    began, count, failed = time.monotonic(), 0, 0

    def batches() -> Iterator[int]:
        nonlocal failed
        for names, pixels, broken in _decoded(reader, inputs, batch_size):
            good = [i for i in range(len(names)) if i not in broken]
            readings = reader.read_pixels(pixels[good]) if good else []
            for i, reading in zip(good, readings):
                reason = table.add(names[i], reading, lexicon.nearest(reading.text) if lexicon else None)
                if reason:
                    broken[i] = reason
            for i, reason in sorted(broken.items()):
                print(f"rcmstr read: {names[i]}: {reason}", file=sys.stderr)
            failed += len(broken)
            table.flush()
            yield len(names)

    total = None if inputs.total is None else -(-inputs.total // batch_size)
    for words in progress(batches(), total, "reading", f"batches of {batch_size} words"):
        count += words
    seconds = max(time.monotonic() - began, 1e-9)
    left_out = f", {failed} left out" if failed else ""
    print(f"rcmstr read: {count} words in {seconds:.1f} s, {count / seconds:.0f} words/s{left_out}", file=sys.stderr)
    return int(failed > 0)


def _decoded(reader: "Reader", inputs: "Inputs", batch_size: int) -> Iterator["Decoded"]:
    """Names, pixels and broken pictures of every batch; the next one is read while the caller works on one."""
    from rcmstr_fast import env
    from rcmstr_fast.data.decode import decode_batch

    limits = DataConfig()
    with ThreadPoolExecutor(env.threads()) as pool, ThreadPoolExecutor(1) as ahead:
        batches = inputs.batches(batch_size, sys.stdin)

        def make() -> "Decoded | None":
            found = next(batches, None)
            if found is None:
                return None
            names, items = found
            pixels, broken = decode_batch(
                items,
                *reader.size,
                max_pixels=limits.max_pixels,
                min_side=limits.min_side,
                pool=pool,
                rotate=reader.recogniser.rotate,
            )
            return names, pixels, broken

        waiting: Future[Decoded | None] = ahead.submit(make)
        while (made := waiting.result()) is not None:
            waiting = ahead.submit(make)
            yield made
