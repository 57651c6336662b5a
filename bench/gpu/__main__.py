"""Everything that needs a GPU, in pieces of at most eight minutes: `make gpu`, or

    python -m bench.gpu [PIECE ..] [--list] [--dry] [--out FOLDER] [--again] ...

Each piece runs in a process of its own and leaves one JSON. A piece that has a record for the present sources is left
out, so that the same command goes on where the last one ended. `--list` says what each piece needs and what is missing.
No network and no virtual environment are used: it runs with the Python that has torch.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from bench.gpu.pieces import PIECES
from bench.gpu.setting import ROOT, Piece, Setting, done, record_name, write


def main(arguments: list[str] | None = None) -> int:
    """Run the pieces; 1 where one failed."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(words)
    unknown = [name for name in options.pieces if name not in PIECES]
    if unknown:
        print(f"bench.gpu: unknown piece {unknown[0]}; the pieces are {', '.join(PIECES)}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(
        out=options.out, device=device, dry=options.dry, work=options.work, words=options.words, test=options.test,
        seed=options.seed, steps=options.steps, changes=tuple(options.set), tag=options.tag, limit=options.limit,
        commit=options.commit,
    )  # fmt: skip
    if options.list:
        _show(setting)
        return 0
    if options.inside:
        return inside(PIECES[options.pieces[0]], setting)
    statuses = [_run(PIECES[name], setting, options.again) for name in options.pieces or PIECES]
    return max(statuses, default=0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    out = os.environ.get("OUT") or ROOT / "bench" / "results"
    parser.add_argument("pieces", nargs="*", help="pieces to run; none: all of them")
    parser.add_argument("--list", action="store_true", help="show the pieces, what is done and what is missing")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on a CPU too; the records mean nothing")
    parser.add_argument("--again", action="store_true", help="also pieces that have a record")
    parser.add_argument("--out", type=Path, default=Path(out), help="folder of the records (default: $OUT, else here)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu", help="folder for what pieces make")
    parser.add_argument("--words", default="", help="file of words to render, one a line")
    parser.add_argument("--test", default="", help="zip, folder or LMDB of labelled real words for learning")
    parser.add_argument("--seed", type=int, default=0, help="seed of learning")
    parser.add_argument("--steps", type=int, default=0, help="pretraining steps of learning; 0: the piece's own")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a training field")
    parser.add_argument("--tag", default="", help="appended to the names of the records")
    parser.add_argument("--limit", type=float, default=470.0, help="seconds a piece may take")
    parser.add_argument("--commit", default="", help="commit for the records, where there is no git checkout")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser


def _show(setting: Setting) -> None:
    if setting.device == "cpu":
        print("this machine has no CUDA GPU (or torch sees none): only --dry runs are possible")
    for piece in PIECES.values():
        lacks = piece.missing()
        state = "done" if done(piece, setting) else f"missing: {', '.join(lacks)}" if lacks else "ready"
        print(f"{piece.name:<22} {piece.about}: {state}")


def _run(piece: Piece, setting: Setting, again: bool) -> int:
    """One piece in a process of its own, unless it is done or cannot run here."""
    if not again and (path := done(piece, setting)):
        print(f"{piece.name}: done, {path}", flush=True)
        return 0
    lacks = [
        *([] if setting.dry or setting.device == "cuda" else ["a CUDA GPU"]),
        *([] if setting.dry else piece.missing()),
    ]
    if lacks:
        print(f"{piece.name}: left out, missing {', '.join(lacks)}", flush=True)
        return 0
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(setting.work.absolute() / "inductor"))
    command = [sys.executable, "-m", "bench.gpu", piece.name, "--inside", *_options(setting)]
    shutil.rmtree(setting.unfinished, ignore_errors=True)
    start = time.monotonic()
    print(f"{piece.name}: {piece.about}", flush=True)
    try:
        status = subprocess.run(command, cwd=ROOT, env=environment, timeout=setting.limit).returncode
        reason = f"the process ended with status {status}" if status not in (0, 1) else ""
    except subprocess.TimeoutExpired:
        status, reason = 1, f"stopped after {setting.limit:.0f} s"
    if reason and not done(piece, setting):
        write(piece, setting, [*_unfinished(setting), {"status": "stopped", "reason": reason}])
    print(f"{piece.name}: {reason or 'finished'}, {time.monotonic() - start:.0f} s", flush=True)
    return int(status != 0)


def _unfinished(setting: Setting) -> list[dict]:
    """The rows that a stopped piece had measured."""
    found: list[dict] = []
    for path in sorted(setting.unfinished.rglob("*.json"), key=lambda p: p.stat().st_mtime):
        with contextlib.suppress(ValueError):  # it was being written
            found += json.loads(path.read_text(encoding="utf-8"))["rows"]
    return found


def _options(setting: Setting) -> list[str]:
    """The command line that makes the same setting."""
    named = {name: str(getattr(setting, name)) for name in ("words", "test", "seed", "steps", "tag", "limit", "commit")}
    named |= {"out": str(setting.out.absolute()), "work": str(setting.work.absolute())}
    words = [f"--{name}={value}" for name, value in named.items()]
    return [*words, *(f"--set={change}" for change in setting.changes), *(["--dry"] if setting.dry else [])]


def inside(piece: Piece, setting: Setting) -> int:
    """Run a piece in this process and write its record; 1 where it or one of its checks failed."""
    start = time.monotonic()
    setting.work.mkdir(parents=True, exist_ok=True)
    try:
        rows = piece.run(setting)
    except Exception as error:  # the reason belongs into the record, the other pieces go on
        traceback.print_exc()
        rows = [{"status": "stopped", "reason": f"{type(error).__name__}: {str(error)[:400]}"}]
    for row in rows:
        row.setdefault("status", "ok")
    rows[0]["piece_seconds"] = time.monotonic() - start
    path = write(piece, setting, rows)
    print(f"{record_name(piece, setting)}: {len(rows)} rows, {path}", flush=True)
    return int(any(row["status"] in ("stopped", "FAIL", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
