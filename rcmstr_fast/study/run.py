"""Running a study: commands in processes of their own, each once; what a kill interrupted goes on where it was.

The commands themselves continue an interrupted run exactly, so the runner keeps only which of them ended well, in
`cells/ID.json` below the study's folder, with the time they took and the machine that took it.
"""

import contextlib
import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcmstr_fast.config import ConfigError, RunError
from rcmstr_fast.study.plan import Cell, Study, cells
from rcmstr_fast.train.checkpoint import write_text
from rcmstr_fast.train.environment import commit, processor

_log = logging.getLogger(__name__)

#: What runs a command of the study; its words follow.
RCMSTR = (sys.executable, "-m", "rcmstr_fast.cli.main")

#: Seconds between looks at the running commands.
_LOOK = 0.2


@dataclass
class Outcome:
    """What became of a study's commands.

    Attributes:
        done: ids that ended well, now or before.
        failed: id -> last line of what the command said.
        waiting: ids that could not run since what they need failed.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)


def run_study(
    study: Study,
    folder: Path,
    data: dict[str, str],
    *,
    recipe: Callable[[str], Path],
    jobs: int = 1,
    only: Sequence[str] = (),
    known: Collection[str] = (),
    report: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run every command of a study that has not ended well yet.

    Args:
        study: checked.
        folder: of the study; created.
        data: name -> path; what the study renders is rendered where it is missing here.
        recipe: finds the YAML file of a recipe's name.
        jobs: commands at the same time.
        only: names of rows; empty: all.
        known: ids of evaluations whose results are at hand; they are not made again, nor is what only they need.
        report: called after each command.
    Returns:
        What became of them.
    Raises:
        ConfigError: the study names what there is not.
        RunError: a signal ended the study; its commands have saved what they had.
    """
    planned = cells(study, folder, data_paths(study, folder, data), recipe)
    wanted = to_run(of_rows(study, planned, only), known)
    folder.mkdir(parents=True, exist_ok=True)
    _render(study, folder, data)
    runner = _Runner(folder, wanted, jobs, report)
    with _terminated():
        return runner.run()


def of_rows(study: Study, planned: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The commands of some rows, and what those need; of all rows where `only` is empty.

    Raises:
        ConfigError: the study has no row of a name.
    """
    names = [row.name for row in study.rows]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ConfigError(f"only must name rows of the study ({', '.join(map(repr, names))}), got {unknown[0]!r}")
    needs = {cell.needs for cell in planned if cell.row in only and cell.needs}
    return [c for c in planned if not only or c.row in only or c.id in needs]


def to_run(planned: Sequence[Cell], known: Collection[str]) -> list[Cell]:
    """The commands without the evaluations that are known and without pretrainings that only those need."""
    left = [cell for cell in planned if cell.id not in known]
    needed, needs = {cell.needs for cell in left}, {cell.needs for cell in planned}
    return [cell for cell in left if cell.id in needed or cell.id not in needs]


def record_path(folder: Path, cell: str) -> Path:
    """Where it stands that a command ended well."""
    return folder / "cells" / f"{cell}.json"


def read_record(folder: Path, cell: str) -> dict[str, Any] | None:
    """The record of a command that ended well, or None."""
    try:
        found = json.loads(record_path(folder, cell).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class _Runner:
    """The commands under way.

    Args:
        folder: of the study.
        planned: commands, each after those it needs.
        jobs: at the same time.
        report: called after each command.
    """

    def __init__(self, folder: Path, planned: list[Cell], jobs: int, report: Callable[[], None]) -> None:
        self.folder, self.planned, self.jobs, self.report = folder, planned, jobs, report
        self.outcome = Outcome()
        self.running: dict[int, tuple[Cell, subprocess.Popen, float]] = {}

    def run(self) -> Outcome:
        """Run what is left, as many at a time as there may be; every row with one seed before any with the next."""
        left = sorted((cell for cell in self.planned if not self._was_done(cell)), key=lambda cell: cell.seed)
        _log.info("%d of %d commands are left", len(left), len(self.planned))
        try:
            while left or self.running:
                for cell in [c for c in left if self._ready(c)][: self.jobs - len(self.running)]:
                    left.remove(cell)
                    self._start(cell, len(left))
                for cell in [c for c in left if self._hopeless(c)]:
                    left.remove(cell)
                    self.outcome.waiting.append(cell.id)
                time.sleep(_LOOK)
                self._collect()
        finally:
            self._stop()
        return self.outcome

    def _was_done(self, cell: Cell) -> bool:
        record = read_record(self.folder, cell.id)
        if record is None:
            return False
        if record.get("digest") != cell.digest:
            raise ConfigError(
                f"{cell.id} has been done with other fields; give the study another folder, or remove "
                f"{record_path(self.folder, cell.id)} and {self.folder / cell.id} to do it again"
            )
        self.outcome.done.append(cell.id)
        return True

    def _ready(self, cell: Cell) -> bool:
        return not cell.needs or cell.needs in self.outcome.done

    def _hopeless(self, cell: Cell) -> bool:
        return cell.needs in self.outcome.failed or cell.needs in self.outcome.waiting

    def _start(self, cell: Cell, left: int) -> None:
        log = self.folder / "logs" / f"{cell.id}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [*RCMSTR, *cell.arguments()]
        with open(log, "ab") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=_end_with_parent
            )
        self.running[process.pid] = cell, process, time.monotonic()
        _log.info("%s: begun, %d after it", cell.id, left + len(self.running) - 1)

    def _collect(self) -> None:
        """Look which commands have ended."""
        for pid in list(self.running):
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended != pid:
                continue
            cell, process, began = self.running.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.monotonic() - began
            if process.returncode == 0:
                self._ended_well(cell, seconds, usage.ru_utime + usage.ru_stime)
            else:
                self.outcome.failed[cell.id] = _last_line(self.folder / "logs" / f"{cell.id}.log")
                _log.error("%s: status %d: %s", cell.id, process.returncode, self.outcome.failed[cell.id])
            self.report()

    def _ended_well(self, cell: Cell, seconds: float, cpu_seconds: float) -> None:
        record = {
            "id": cell.id,
            "row": cell.row,
            "seed": cell.seed,
            "command": cell.command,
            "evaluation": cell.evaluation,
            "arguments": cell.arguments(),
            "digest": cell.digest,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "processor": processor(),
            "commit": commit(),
        }
        path = record_path(self.folder, cell.id)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        write_text(path, text)
        self.outcome.done.append(cell.id)
        _log.info("%s: done in %s", cell.id, _duration(seconds))

    def _stop(self) -> None:
        """Ask running commands to save and end, and wait for them."""
        for _, process, _ in self.running.values():
            process.terminate()
        for _, process, _ in self.running.values():
            process.wait()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _end_with_parent() -> None:
    """In a new process: be asked to save and end where the study is killed (Linux)."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def console_log() -> Iterator[None]:
    """While entered, what the runner tells goes to standard error, a line each."""
    handler, package = logging.StreamHandler(), logging.getLogger("rcmstr_fast")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


class _terminated:
    """While entered, SIGTERM raises a RunError where the study waits, so that running commands are ended in order."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGTERM, self._raise)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    @staticmethod
    def _raise(number: int, _: object) -> None:
        raise RunError("stopped by SIGTERM; the same command continues", 128 + number)


def data_paths(study: Study, folder: Path, data: dict[str, str]) -> dict[str, str]:
    """name -> path of all data of the study; given paths win over what the study renders."""
    unknown = next((name for name in data if name not in study.data), None)
    if unknown is not None:
        raise ConfigError(f"data must name data of the study ({', '.join(study.data) or 'none'}), got {unknown}")
    paths = {}
    for name, source in study.data.items():
        if name in data:
            paths[name] = data[name]
        elif isinstance(source, dict):
            paths[name] = str(folder / "data" / name)
        elif source:
            paths[name] = str(source)
        else:
            raise ConfigError(f"the study needs data {name}: --data.{name} PATH")
    return paths


def _render(study: Study, folder: Path, data: dict[str, str]) -> None:
    """Render the sets that the study describes and that are not there yet."""
    from rcmstr_fast.study.words import render_set

    for name, source in study.data.items():
        place = folder / "data" / name
        if name not in data and isinstance(source, dict) and not place.exists():
            _log.info("rendering %s", place)
            render_set(source, place)
