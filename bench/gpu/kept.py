"""The records of the pieces: one file for each family of pieces, at most seven in all, so that few files travel.

A file is a record of `rcmstr_fast.measure.records` whose rows name their `piece`, with the state of each piece beside
them. A piece that is measured again replaces its rows. What was measured earlier is looked for in the output folder
and in `bench/results`, and an output folder that was empty begins with what `bench/results` has.
"""

import datetime
import functools
from pathlib import Path
from typing import Any

from bench.gpu import setting as settings
from bench.gpu.setting import Piece, Rows, Setting
from rcmstr_fast.config import ConfigError
from rcmstr_fast.measure import machine, records

#: A row with one of these means that the piece is not done, or that a check of it failed.
STOPPED, WRONG = "stopped", ("stopped", "FAIL", "failed")


@functools.cache
def describe(device: str, commit: str) -> dict[str, Any]:
    """The machine and the state of the sources; `commit` names it where there is no git checkout."""
    about = machine.describe() | {"sources": settings.digest()}
    return about | ({"commit": commit} if commit else {})


def key_of(piece: Piece, setting: Setting) -> str:
    """Name of the piece in its record, with seed and tag."""
    parts = [piece.name, *([f"s{setting.seed}"] if piece.seeded else []), *([setting.tag] if setting.tag else [])]
    return "-".join(parts)


def write(piece: Piece, setting: Setting, rows: Rows, *, whole: bool) -> Path:
    """Write the rows of a piece into the record of its family.

    Args:
        piece: that was measured.
        setting: of the run.
        rows: of it.
        whole: the piece is done; False: it is still running, or it was stopped.
    """
    key, about = key_of(piece, setting), describe(setting.device, setting.commit)
    found = _earlier(piece, setting)
    others = [row for row in found.get("rows", []) if row.get("piece") != key]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    state = {"whole": whole, "sources": about["sources"], "commit": about["commit"], "datetime": now}
    pieces = {name: kept for name, kept in found.get("pieces", {}).items() if name != key} | {key: state}
    made = records.record([*others, *({"piece": key} | row for row in rows)], about=about, pieces=pieces)
    return records.write(setting.out, f"gpu-{piece.family}", made)


def rows_of(piece: Piece, setting: Setting) -> Rows:
    """The rows that the record of its family has of a piece."""
    key = key_of(piece, setting)
    return [row for row in _earlier(piece, setting).get("rows", []) if row.get("piece") == key]


def done(piece: Piece, setting: Setting) -> Path | None:
    """The record that holds the piece for these sources, if every row of it could be measured."""
    key = key_of(piece, setting)
    for folder in _folders(setting):
        for path in sorted(folder.glob(f"*/gpu-{piece.family}.json")):
            state = _read(path).get("pieces", {}).get(key, {})
            if state.get("whole") and state.get("sources") == settings.digest() and piece.holds():
                return path
    return None


def _folders(setting: Setting) -> list[Path]:
    """Where records may lie; a dry run knows its own only."""
    return [setting.out] if setting.dry else list(dict.fromkeys([setting.out, settings.RESULTS]))


def _earlier(piece: Piece, setting: Setting) -> dict[str, Any]:
    """The record of the piece's family on this machine: in the output folder, else in `bench/results`."""
    name = machine.name_of(describe(setting.device, setting.commit))
    for folder in _folders(setting):
        path = folder / name / f"gpu-{piece.family}.json"
        if path.is_file():
            return _read(path)
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return records.read(path)
    except ConfigError:
        return {}
