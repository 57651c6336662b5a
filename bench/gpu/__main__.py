"""Everything that needs a GPU, in pieces of at most eight minutes: `make gpu`, or

    python -m bench.gpu [PIECE ..] [--list] [--dry] [--out FOLDER] [--again] ...

Each piece runs in a process of its own. A piece that has been measured for the present sources is left out, so that
the same command goes on where the last one ended. `--list` says what each piece needs and what is missing. No network
and no virtual environment are used: it runs with the Python that has torch. Exit status: 0; 1 where a piece failed; 2
where there is no GPU or no such piece.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch

from bench.gpu import kept, runner
from bench.gpu.pieces import PIECES
from bench.gpu.setting import RESULTS, ROOT, Setting


def main(arguments: list[str] | None = None) -> int:
    """Run the pieces; the exit status."""
    options = _parser().parse_args(arguments)
    unknown = [name for name in options.pieces if name not in PIECES]
    if unknown:
        print(f"bench.gpu: unknown piece {unknown[0]}; the pieces are {', '.join(PIECES)}", file=sys.stderr)
        return 2
    setting = _setting(options)
    if options.list:
        _show(setting)
        return 0
    if options.inside:
        return runner.inside(PIECES[options.pieces[0]], setting)
    if setting.device == "cpu" and not setting.dry:
        print("bench.gpu: expected a CUDA GPU, torch finds none; --dry runs tiny sizes here", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the running piece ends too
    return max((runner.run(PIECES[name], setting, options.again) for name in options.pieces or PIECES), default=0)


def _setting(options: argparse.Namespace) -> Setting:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = options.out or (options.work / "dry" if options.dry else Path(os.environ.get("OUT") or RESULTS))
    return Setting(
        out=out,
        device=device,
        dry=options.dry,
        work=options.work,
        words=options.words,
        test=options.test,
        seed=options.seed,
        steps=options.steps,
        changes=tuple(options.set),
        tag=options.tag,
        limit=options.limit,
        commit=options.commit,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("pieces", nargs="*", help="pieces to run; none: all of them")
    parser.add_argument("--list", action="store_true", help="show the pieces, what is done and what is missing")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU too; the records mean nothing")
    parser.add_argument("--again", action="store_true", help="also pieces that have a record")
    parser.add_argument("--out", type=Path, help="folder of the records (default: $OUT, else bench/results)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="folder for what pieces make")
    parser.add_argument("--words", default="", help="file of words to render, one a line")
    parser.add_argument("--test", default="", help="zip, folder or LMDB of labelled real words for learning")
    parser.add_argument("--seed", type=int, default=0, help="seed of learning")
    parser.add_argument("--steps", type=int, default=0, help="pretraining steps of learning; 0: the piece's own")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a training field")
    parser.add_argument("--tag", default="", help="appended to the names of the pieces in the records")
    parser.add_argument("--limit", type=float, default=470.0, help="seconds a piece may take")
    parser.add_argument("--commit", default="", help="commit for the records, where there is no git checkout")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser


def _show(setting: Setting) -> None:
    if setting.device == "cpu":
        print("this machine has no CUDA GPU (or torch sees none): only --dry runs are possible")
    for piece in PIECES.values():
        lacks = piece.missing()
        state = "done" if kept.done(piece, setting) else f"missing: {', '.join(lacks)}" if lacks else "ready"
        print(f"{piece.name:<22} {piece.about}: {state}")


if __name__ == "__main__":
    sys.exit(main())
