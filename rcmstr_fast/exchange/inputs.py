"""The pictures of `rcmstr read`: files, folders, LMDBs, patterns, names on standard input; a few at a time."""

import glob
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.source import ImageSource, open_sources

#: Larger files are no word images.
MAX_FILE_BYTES = 64 << 20
_STDIN = "-"

#: Names and encoded pictures (None: cannot be read) of a batch.
Batch = tuple[list[str], list[bytes | None]]


@dataclass(frozen=True)
class Inputs:
    """What was asked for, opened but not read.

    Attributes:
        parts: each a source of records, a list of files, or None for standard input.
        total: number of pictures; None where standard input names them.
    """

    parts: list[ImageSource | list[str] | None]
    total: int | None

    def batches(self, batch_size: int, names: TextIO) -> Iterator[Batch]:
        """Names and contents of all pictures in order, at most `batch_size` of them in memory.

        Args:
            batch_size: pictures a batch.
            names: standard input: a file name a line.
        """
        for part in self.parts:
            if isinstance(part, ImageSource):
                for first in range(0, len(part), batch_size):
                    records = range(first, min(first + batch_size, len(part)))
                    yield [part.name(i) for i in records], part.read(records)
            else:
                lines = (line.rstrip("\r\n") for line in names)
                files: Iterable[str] = part if part is not None else (line for line in lines if line)
                yield from _file_batches(files, batch_size)


def open_inputs(arguments: Sequence[str]) -> Inputs:
    """Look up what the arguments of a command name.

    Args:
        arguments: each a picture, a folder of pictures, an LMDB or a folder of LMDBs, a pattern (`*`, `?`, `[..]`,
            `**` at any depth), or `-` for a file name a line on standard input.
    Raises:
        ConfigError: a pattern that matches nothing, a folder without pictures, or `-` twice.
    """
    if list(arguments).count(_STDIN) > 1:
        raise ConfigError("- (names on standard input) can be given once")
    parts: list[ImageSource | list[str] | None] = []
    for argument in arguments:
        if argument == _STDIN:
            parts.append(None)
        elif _is_source(argument):
            parts.append(open_sources([argument]))
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            parts += _matches(argument)
        else:
            _files_of(parts).append(argument)
    total = None if None in parts else sum(len(part) for part in parts if part is not None)
    return Inputs(parts, total)


def _is_source(path: str) -> bool:
    return os.path.isdir(path) or (os.path.isfile(path) and os.path.basename(path) == "data.mdb")


def _matches(pattern: str) -> list[ImageSource | list[str] | None]:
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise ConfigError(f"no file or folder matches {pattern}")
    parts: list[ImageSource | list[str] | None] = []
    # Of `**` the files below a folder are matches themselves.
    files = [path for path in found if not os.path.isdir(path)]
    if files:
        return [files]
    parts.append(open_sources(found))
    return parts


def _files_of(parts: list[ImageSource | list[str] | None]) -> list[str]:
    """The list at the end of the parts that further files join."""
    if not parts or not isinstance(parts[-1], list):
        parts.append([])
    last = parts[-1]
    assert isinstance(last, list)
    return last


def _file_batches(files: Iterable[str], batch_size: int) -> Iterator[Batch]:
    names: list[str] = []
    for file in files:
        names.append(file)
        if len(names) == batch_size:
            yield names, [_contents(name) for name in names]
            names = []
    if names:
        yield names, [_contents(name) for name in names]


def _contents(name: str) -> bytes | None:
    """A file's bytes; None for what is no file (a pipe would be waited for), too large, or not readable."""
    try:
        status = os.stat(name)
        usable = stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE_BYTES
        return Path(name).read_bytes() if usable else None
    except (OSError, ValueError):
        return None
