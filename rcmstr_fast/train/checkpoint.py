"""Checkpoints: written whole or not at all, checked before they are trusted, never executed.

A file is written beside its place, flushed to the disk and renamed; the former `last.pt` stays as
`previous.pt`. Loading checks the sums of the archive and reads tensors, numbers, strings, lists and
dictionaries only.
"""

import errno
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from rcmstr_fast.config import ConfigError, RunError

KIND = "rcmstr_fast pretraining checkpoint"
FORMAT = 2
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_log = logging.getLogger(__name__)


class _Recorder:
    """A file that remembers the OSError of a write, which torch's archive writer replaces by its own error."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """`write_whole` of a text as UTF-8; `errors` as of `str.encode`."""
    write_whole(path, lambda file: file.write(text.encode("utf-8", errors)))


def write_whole(path: Path, write: Callable[[Any], object]) -> None:
    """Let `write(file)` fill a temporary file and rename it to `path` once it is on the disk.

    Raises:
        RunError: the file could not be written; the temporary is removed and `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    recorder = None
    try:
        with open(temporary, "wb") as file:
            recorder = _Recorder(file)
            write(recorder)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as raised:
        cause = raised if isinstance(raised, OSError) else recorder.error if recorder else None
        temporary.unlink(missing_ok=True)
        if cause is None:
            raise
        free = shutil.disk_usage(path.parent).free / 2**30
        advice = f", {free:.2f} GiB free" if cause.errno in _FULL else ""
        raise RunError(
            f"cannot save {path}: {os.strerror(cause.errno or errno.EIO)}{advice}; earlier checkpoints are intact"
        ) from raised


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: Path, state: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Write a checkpoint.

    Args:
        path: e.g. `checkpoints/last.pt`.
        state: tensors and plain values; KIND and FORMAT are added.
        keep_previous: leave the file that was at `path` as `previous.pt` beside it.
    Raises:
        RunError: the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name("next.pt") if keep_previous else path
    write_whole(fresh, lambda file: torch.save({"kind": KIND, "format": FORMAT, **state}, file))
    if keep_previous:
        if path.exists():
            os.replace(path, path.with_name("previous.pt"))
        os.replace(fresh, path)
        sync_folder(path.parent)


class Writer:
    """While entered, writes in a background thread, one piece of work at a time; left only when all is written."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Wait for the work before, then begin `write`; raises the failure of the work before."""
        self.wait()
        if self._pool is None:
            write()
        else:
            self._pending = self._pool.submit(write)

    def check(self) -> None:
        """Raise the failure of work that has ended, without waiting."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is under way; raises its failure."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Writer":
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)
        try:
            self.wait()
        except RunError as failure:
            if error is None:
                raise
            _log.error("%s", failure)


def damage(path: Path) -> str | None:
    """What is wrong with the archive at `path`, or None where every sum is right."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                return "not a checkpoint (its parts are compressed)"
            if sum(member.file_size for member in members) > path.stat().st_size:
                return "not a checkpoint (its parts are larger than the file)"
            bad = archive.testzip()
    except FileNotFoundError:
        return "missing"
    except Exception as error:  # what zipfile makes of a foreign file: structs, codecs, numbers, ...
        return f"cut off or not a checkpoint ({' '.join(str(error).split())})"
    return f"damaged ({bad})" if bad else None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without executing anything from it.

    Raises:
        ConfigError: the file is missing, damaged, or not one of ours.
    """
    wrong = damage(path)
    if wrong:
        raise ConfigError(f"{path}: expected a checkpoint, it is {wrong}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign pickle can end its reader, which runs none of it, in any way
        raise ConfigError(f"{path}: expected a checkpoint of rcmstr_fast, it cannot be read as one") from error
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise ConfigError(f"{path}: expected a checkpoint of rcmstr_fast, it is some other file")
    if state.get("format") != FORMAT:
        raise ConfigError(f"{path}: expected checkpoint format {FORMAT}, got {state.get('format')!r}")
    return state


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's `checkpoints` folder, or None where there is none yet.

    A damaged `last.pt` is named in the log and the one before it taken.

    Raises:
        ConfigError: there are checkpoints, but none is whole.
    """
    wrong = {}
    for name in ("last.pt", "previous.pt"):
        path = folder / name
        reason = damage(path)
        if reason is None:
            return path
        if reason != "missing":
            wrong[name] = reason
            _log.warning("%s is %s; looking for the one before it", path, reason)
    if wrong:
        raise ConfigError(f"{folder}: no whole checkpoint: {'; '.join(f'{n} is {r}' for n, r in wrong.items())}")
    return None
