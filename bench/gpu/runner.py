"""One piece: in a process of its own, whose whole group ends with it."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
import traceback

from bench.gpu import kept
from bench.gpu.setting import ROOT, Piece, Rows, Setting


def run(piece: Piece, setting: Setting, again: bool) -> int:
    """A piece in a process of its own, unless it is done or this machine lacks something; 1 where it failed."""
    if not again and (path := kept.done(piece, setting)):
        print(f"{piece.name}: done, {path}", flush=True)
        return 0
    if lacks := [] if setting.dry else piece.missing():
        print(f"{piece.name}: left out, missing {', '.join(lacks)}", flush=True)
        return 0
    start = time.monotonic()
    print(f"{piece.name}: {piece.about}", flush=True)
    _forget_unfinished(piece, setting)
    status = limited([sys.executable, "-m", "bench.gpu", piece.name, "--inside", *words(setting)], setting)
    reason = ""
    if status is None:
        reason = f"stopped after {setting.limit:.0f} s"
    elif status not in (0, 1):
        reason = f"the process ended with status {status}"
    if reason and not kept.done(piece, setting):
        rows = kept.rows_of(piece, setting)
        kept.write(piece, setting, [*rows, {"status": kept.STOPPED, "reason": reason}], whole=False)
    ending = reason or ("finished" if status == 0 else "failed, see its record")
    print(f"{piece.name}: {ending}, {time.monotonic() - start:.0f} s", flush=True)
    return int(status != 0)


def _forget_unfinished(piece: Piece, setting: Setting) -> None:
    """Drop the rows of an earlier try, which would be taken for those of this one if it is stopped."""
    if kept.rows_of(piece, setting):
        kept.write(piece, setting, [], whole=False)


def limited(command: list[str], setting: Setting) -> int | None:
    """The exit status of a command, or None where it took longer than the limit; its children end with it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(setting.work.absolute() / "inductor"))
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(setting.limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def words(setting: Setting) -> list[str]:
    """The command line that makes the same setting."""
    named = {name: str(getattr(setting, name)) for name in ("words", "test", "seed", "steps", "tag", "limit", "commit")}
    named |= {"out": str(setting.out.absolute()), "work": str(setting.work.absolute())}
    made = [f"--{name}={value}" for name, value in named.items()]
    return [*made, *(f"--set={change}" for change in setting.changes), *(["--dry"] if setting.dry else [])]


def inside(piece: Piece, setting: Setting) -> int:
    """Run a piece in this process and write its record; 1 where it or one of its checks failed."""
    start = time.monotonic()
    setting.work.mkdir(parents=True, exist_ok=True)
    setting = dataclasses.replace(setting, keep=lambda rows: _keep(piece, setting, rows))
    try:
        rows = piece.run(setting) or [{"status": kept.STOPPED, "reason": "it measured nothing"}]
    except Exception as error:  # the reason belongs into the record, the other pieces go on
        traceback.print_exc()
        reason = f"{type(error).__name__}: {str(error)[:400]}"
        rows = [*kept.rows_of(piece, setting), {"status": kept.STOPPED, "reason": reason}]
    rows = [{"status": "ok"} | row for row in rows]
    rows[0]["piece_seconds"] = time.monotonic() - start
    whole = all(row["status"] != kept.STOPPED for row in rows)
    path = kept.write(piece, setting, rows, whole=whole)
    print(f"{kept.key_of(piece, setting)}: {len(rows)} rows, {path}", flush=True)
    return int(any(row["status"] in kept.WRONG for row in rows))


def _keep(piece: Piece, setting: Setting, rows: Rows) -> None:
    kept.write(piece, setting, [{"status": "ok"} | row for row in rows], whole=False)
