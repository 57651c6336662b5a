"""Reads the result files of `bench/results` for the pages that are generated from them."""

import json
from pathlib import Path
from typing import Any

NOT_YET = "not yet measured: no GPU run"
Row = dict[str, Any]
#: machine -> name of a record without the version -> record
Records = dict[str, dict[str, dict[str, Any]]]


def load(results: Path) -> Records:
    """All records of all machines; the tables of ahead-of-time builds stay apart."""
    found: Records = {}
    for path in sorted(results.glob("*/*.json")):
        if path.parent.name == "aot":
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        name, version = path.stem, record.get("version") or record.get("environment", {}).get("version", "")
        name = name.removesuffix(version).rstrip("-") or "ops"
        found.setdefault(path.parent.name, {})[name] = record
    return found


def gpus(records: Records) -> list[str]:
    """The machines with a GPU."""
    return [machine for machine in records if machine != "cpu"]


def rows_of(records: Records, machine: str, *names: str) -> list[Row]:
    """Rows of the records whose names begin with one of `names`, those that could be measured or failed."""
    found = []
    for name, record in records.get(machine, {}).items():
        if name.startswith(names):
            found += [row for row in record.get("rows", []) if row.get("status", "ok") != "stopped"]
    return found


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    """A number for a table, or a dash."""
    return "-" if value is None else f"{scale * value:,.{digits}f}"


def best(rows: list[Row], **wanted: Any) -> Row | None:
    """The fastest row that could be measured and has the wanted values."""
    fitting = [r for r in rows if r.get("status") == "ok" and all(r.get(k) == v for k, v in wanted.items())]
    return min(fitting, key=lambda row: row["ms"], default=None)


def steps(records: Records, machine: str) -> list[Row]:
    """Whole steps of every provider, from the command and from the GPU pieces."""
    names = ("step", "gpu-step", "gpu-compile", "gpu-large", "gpu-methods", "gpu-switches", "gpu-memory")
    rows = rows_of(records, machine, *names)
    return [row for row in rows if "provider" in row and "part" not in row and "batch" in row]
