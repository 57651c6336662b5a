"""The records of `bench/results`, and what pages choose from them."""

from pathlib import Path
from typing import Any

from rcmstr_fast.measure import records as measured
from rcmstr_fast.measure.records import Record, Row

#: machine -> name of a record without the version -> record
Records = dict[str, dict[str, Record]]
#: group of rows -> names of records that hold it, the best first: steps and the data path are timed in turn by the
#: command, operations by pytest-benchmark. What a GPU piece left counts always.
SOURCES = {
    "ops": (("benchmarks",), ("ops", "masked-pass")),
    "step": (("step",), ("benchmarks",)),
    "data": (("pipeline",), ("benchmarks",)),
}
#: Folders beside the machines.
_OTHERS = ("aot", "studies")


def load(results: Path) -> Records:
    """All records of all machines; ahead-of-time builds and studies stay apart."""
    found: Records = {}
    for path in sorted(results.glob("*/*.json")):
        if path.parent.name not in _OTHERS:
            record = measured.read(path)
            version = record["machine_info"].get("version", "")
            found.setdefault(path.parent.name, {})[path.stem.removesuffix(version).rstrip("-")] = record
    return found


def studies(results: Path) -> list[Record]:
    """The records of studies, in the order of their file names."""
    return [measured.read(path) for path in sorted((results / "studies").glob("*.json"))]


def gpus(records: Records) -> list[str]:
    """The machines with a GPU."""
    return [machine for machine in records if machine != "cpu"]


def rows_of(records: Records, machine: str, *names: str) -> list[Row]:
    """Rows of the records with these names, without pieces that were stopped."""
    found = []
    for name in names:
        record = records.get(machine, {}).get(name)
        found += [] if record is None else [r for r in measured.rows_of(record) if r.get("status", "ok") != "stopped"]
    return found


def piece(records: Records, machine: str, *names: str) -> list[Row]:
    """Rows of the pieces of `make gpu` whose names begin with one of `names`."""
    families = [name for name in records.get(machine, {}) if name.startswith("gpu-")]
    return [row for row in rows_of(records, machine, *families) if row.get("piece", "").startswith(names)]


def group(records: Records, machine: str, name: str) -> list[Row]:
    """Rows of a group of SOURCES, from the best records that a machine has, and from the pieces of `make gpu`."""
    families = [record for record in records.get(machine, {}) if record.startswith("gpu-")]
    for names in SOURCES[name]:
        found = [row for row in rows_of(records, machine, *names) if row.get("group") == name]
        if found:
            break
    return found + [row for row in rows_of(records, machine, *families) if row.get("group") == name]


def good(rows: list[Row], **wanted: Any) -> list[Row]:
    """The rows that could be measured and have the wanted values."""
    return [r for r in rows if r.get("status") == "ok" and all(r.get(k) == v for k, v in wanted.items())]


def best(rows: list[Row], **wanted: Any) -> Row | None:
    """The fastest row that could be measured and has the wanted values."""
    return min(good(rows, **wanted), key=lambda row: row["ms"], default=None)


def shortest(row: Row) -> float:
    """The shortest time of a row, in ms; its median where only that was kept."""
    return row.get("best_ms", row["ms"])


def number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    """A number for a table, or a dash."""
    return "-" if value is None else f"{scale * value:,.{digits}f}"


def origin(record: Record) -> str:
    """Where a record comes from: commit, versions, command."""
    about = record["machine_info"]
    commit = record["commit_info"]
    dirty = " with changes" if commit["dirty"] else ""
    command = " ".join(about["command"]) if isinstance(about["command"], list) else about["command"]
    parts = [
        about.get("cpu") and f"{about['cpu']}, {about.get('cpus')} processors",
        f"{about['threads']} threads" if "threads" in about else None,
        f"torch {about.get('libraries', {}).get('torch')}",
        f"commit {(commit['id'] or 'unknown')[:7]}{dirty}",
        f"`{command}`",
    ]
    return ", ".join(part for part in parts if part)
