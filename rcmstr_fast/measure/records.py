"""Records of what was measured: one file format, one writer, one reader.

A record is a JSON object as pytest-benchmark writes it (`machine_info`, `commit_info`, `datetime`, `benchmarks`), so
that `pytest bench --benchmark-compare` reads it, with one list beside its `benchmarks`: `rows` holds what is no timing
of pytest-benchmark, such as a provider that failed its check or a step that was timed in turn with others. A reader
asks for `rows_of` and gets both as flat rows.
"""

import datetime
import json
from pathlib import Path
from typing import Any

import rcmstr_fast
from rcmstr_fast.config import ConfigError
from rcmstr_fast.measure import machine
from rcmstr_fast.timer import quartiles

#: One thing measured: `status` (ok, FAIL, ..), the names of what was measured, and `ms` (median), `ms_25`, `ms_75`,
#: `best_ms`, `rounds` where it was timed.
Row = dict[str, Any]
Record = dict[str, Any]


def record(rows: list[Row], *, about: dict[str, Any] | None = None, **more: Any) -> Record:
    """A record of rows.

    Args:
        rows: what was measured.
        about: the machine as `machine.describe` has it; None: this one.
        more: further facts, kept under their names.
    """
    about = machine.describe() if about is None else about
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "machine_info": about,
        "commit_info": machine.commit_of(about),
        "datetime": now,
        **more,
        "benchmarks": [],
        "rows": rows,
    }


def write(where: Path, name: str, made: Record) -> Path:
    """Write a record, creating the folders above it; the path.

    The file is replaced as a whole, so that a reader never meets half of it.

    Args:
        where: a folder, in which the file is `<machine>/<name>.json`; or the file itself, which ends with .json.
        name: of the record.
        made: the record.
    """
    file = where.suffix.lower() == ".json" and not where.is_dir()
    path = where if file else where / machine.name_of(made["machine_info"]) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".half")
    half.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    half.replace(path)
    return path


def name_with_version(name: str) -> str:
    """The usual name of a record: with the version of the package."""
    return f"{name}-{rcmstr_fast.__version__}"


def read(path: Path) -> Record:
    """Read a record.

    Raises:
        ConfigError: the file is not a record.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows_of(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"expected a record of measurements, got {path} ({error!r})") from error
    return found


def rows_of(found: Record) -> list[Row]:
    """All rows of a record: the timings of pytest-benchmark, then the others."""
    if "rows" not in found and "benchmarks" not in found:
        raise KeyError("rows")
    return [*(_flat(entry) for entry in found.get("benchmarks", ())), *found.get("rows", ())]


def _flat(entry: dict[str, Any]) -> Row:
    """The row of an entry of pytest-benchmark, whose times are in seconds."""
    stats, data = entry["stats"], entry["stats"].get("data")
    first, _, third = quartiles(data) if data else (stats["q1"], stats["median"], stats["q3"])
    times = {"ms": stats["median"], "ms_25": first, "ms_75": third, "best_ms": stats["min"]}
    named = {"group": entry["group"], "name": entry["name"], "status": "ok", "rounds": stats["rounds"]}
    return named | {name: 1e3 * value for name, value in times.items()} | entry["extra_info"]
