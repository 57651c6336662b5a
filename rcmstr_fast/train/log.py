"""What a run tells: metrics.jsonl, log.txt, TensorBoard, a progress bar or plain lines; means kept on the device."""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from rcmstr_fast.console import Forgiving, forgiving
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.line import due, number, short
from rcmstr_fast.train.runfolder import RunFolder
from rcmstr_fast.train.trackers import Trackers, open_trackers

#: Keys of a metrics line that depend on the clock or the machine; all others repeat exactly on a CPU.
WALL_CLOCK = ("images_per_s", "mfu_percent", "data_wait_percent", "memory_gib", "seconds", "broken")

_package = logging.getLogger("rcmstr_fast")


class Meter:
    """Means of 0-d tensors over the finite steps of a logging window; the host reads them at the window's end."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None

    def add(self, values: dict[str, Tensor], finite: Tensor) -> None:
        """Add a step: `values` count where `finite` (0-d bool) holds."""
        self.names = list(values)
        row = torch.stack([*(x.detach() for x in values.values()), torch.ones_like(finite, dtype=torch.float32)])
        row = torch.where(finite, row.double(), 0.0)
        if self.sums is None or self.sums.shape != row.shape:  # a foreign window is not continued
            self.sums = torch.zeros_like(row)
        self.sums += row  # in place: a recorded step adds to the same memory each time

    def read(self, world: World) -> dict[str, float | None]:
        """Means over window and ranks (None where no step was finite), then start a new window."""
        if self.sums is None:
            return {}
        *sums, count = world.mean(self.sums).tolist()
        self.sums.zero_()
        return {name: total / count if count else None for name, total in zip(self.names, sums, strict=True)}

    def state_dict(self, world: World) -> dict[str, Any]:
        """The open window of every rank."""
        rows = None if self.sums is None else world.gather(self.sums[None]).to("cpu", copy=True)
        return {"names": self.names, "sums": rows}

    def load_state_dict(self, state: dict[str, Any], world: World) -> None:
        """Continue a window: this rank's own, or the mean over ranks where their number has changed."""
        self.names, rows = state["names"], state["sums"]
        if rows is None:
            self.sums = None
        else:
            self.sums = (rows[world.rank] if len(rows) == world.world_size else rows.mean(0)).to(world.device)


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step` and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            known = json.loads(line)["step"] <= step and line.endswith(b"\n")
        except (ValueError, KeyError, TypeError):
            known = False
        if known:
            kept.append(line)
    checkpoint.write_whole(path, lambda file: file.write(b"".join(kept)))


def memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class _Console(logging.Handler):
    """Writes records above a progress bar without tearing it."""

    def __init__(self, stream: Forgiving) -> None:
        super().__init__()
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "file_only", False):
            tqdm.write(self.format(record), file=self.stream)


class _Text(logging.FileHandler):
    """log.txt; names that are not UTF-8 are escaped in it, and where it cannot be written the console says so once."""

    def __init__(self, path: Path, console: Forgiving) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self._console, self._said = console, False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._said:
            self._said = True
            tqdm.write(f"{self.baseFilename} cannot be written ({sys.exc_info()[1]})", file=self._console)


class RunLog:
    """The log of one process; only rank 0 writes files.

    What it says before `open` is kept for log.txt: a run that is refused before has left nothing in its folder.

    Args:
        folder: the run folder.
        world: this process.
    """

    def __init__(self, folder: RunFolder, world: World) -> None:
        self.folder, self.world = folder, world
        self.total = self._start = self._window_step = 0
        self.started = self._window = time.monotonic()
        self._waited = self._shown_at = 0.0
        self._shown: int | None = None  # step of the last line of text
        self._metrics: TextIO | None = None
        self._bar = None
        self._trackers = Trackers()
        self._failed: set[str] = set()
        self._level = _package.level
        self._console = forgiving(sys.stderr)
        self._handlers: list[logging.Handler] = [_Console(self._console)]
        self._handlers[0].setLevel(logging.INFO if world.rank == 0 else logging.WARNING)
        self._kept = MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
        if world.rank == 0:
            self._handlers.append(self._kept)
        _package.setLevel(logging.INFO)
        for handler in self._handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            _package.addHandler(handler)

    def open(self) -> None:
        """Begin log.txt, with what has been said so far.

        Raises:
            OSError: it cannot be written.
        """
        if self.world.rank == 0 and self._kept.target is None:
            text = _Text(self.folder.text, self._console)
            text.setFormatter(self._kept.formatter)
            self._kept.setTarget(text)
            self._kept.flushLevel = logging.NOTSET  # from now on nothing waits
            self._kept.flush()

    @contextmanager
    def observing(self, what: str) -> Iterator[None]:
        """Inside stands what only shows the run: that it cannot be is said once, and the run goes on.

        Args:
            what: is shown: `views.png`.
        """
        try:
            yield
        except Exception as error:  # whatever a library makes of a full disk or of a folder that is a file
            if what not in self._failed:
                self._failed.add(what)
                reason = " ".join(str(error).split()) or type(error).__name__
                _package.warning("%s cannot be written (%s); training goes on without it", what, reason)

    def begin(
        self, step: int, total: int, trackers: Sequence[str] = ("tensorboard",), config: Mapping[str, Any] | None = None
    ) -> None:
        """Open the metrics after `step` of `total` steps; what an interrupted run wrote after it is dropped.

        Args:
            step: steps done.
            total: steps of the run.
            trackers: names of those that get the lines as well.
            config: of the run, for them.
        """
        self.open()
        self.total, self._start, self._window_step = total, step, step
        self.started = self._window = time.monotonic()
        if self.world.rank != 0:
            return
        cut_metrics(self.folder.metrics, step)
        self._metrics = open(self.folder.metrics, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._trackers = open_trackers(trackers, self.folder.path, config or {}, step, self.folder.tensorboard)
        if self._console.isatty():
            self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, file=self._console)

    def close(self) -> None:
        """Close the files and give the logger back."""
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            with self.observing("metrics.jsonl"):
                self._metrics.close()
        self._trackers.close()
        text = self._kept.target
        for handler in self._handlers:
            _package.removeHandler(handler)
            handler.close()
        if text is not None:
            with suppress(OSError):
                text.close()
        _package.setLevel(self._level)

    def advance(self) -> None:
        """One step done."""
        if self._bar is not None:
            self._bar.update()

    def speed(self, step: int, images: int, waited: float) -> dict[str, float]:
        """Throughput since the last line.

        Args:
            step: steps done.
            images: images a step, all processes.
            waited: seconds the loop has waited for data since it started.
        """
        now = time.monotonic()
        seconds = max(now - self._window, 1e-9)
        measured = {
            "images_per_s": (step - self._window_step) * images / seconds,
            "data_wait_percent": 100 * (waited - self._waited) / seconds,
            "memory_gib": memory_gib(self.world.device),
            "seconds": now - self.started,
        }
        self._window, self._window_step, self._waited = now, step, waited
        return measured

    def write(self, line: dict[str, Any]) -> None:
        """One metrics line, `step` in it: to the file and the trackers; now and then, and shorter, as text."""
        if self._metrics is None:
            return
        plain = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in line.items()}
        with self.observing("metrics.jsonl"):
            self._metrics.write(json.dumps(plain) + "\n")
            self._metrics.flush()
        self._trackers.log(line["step"], plain)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {number(plain.get('loss'))}")
        now = time.monotonic()
        if due(plain, self.total, self._shown, now - self._shown_at):
            self._shown, self._shown_at = line["step"], now
            text = short(plain, self.total, self._eta(line["step"]))
            _package.info("%s", text, extra={"file_only": self._bar is not None})

    def _eta(self, step: int) -> str:
        done = max(step - self._start, 1)
        left = (time.monotonic() - self.started) / done * (self.total - step)
        return tqdm.format_interval(left)
