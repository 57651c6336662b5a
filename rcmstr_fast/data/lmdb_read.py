"""One LMDB data file, opened at the first read of each process."""

import logging
import os
import re
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import numpy as np

from rcmstr_fast.config import ConfigError

_log = logging.getLogger(__name__)


class _Reader(Protocol):
    """What reads one file: the compiled reader, or the `lmdb` package. Keys of a kind are `kind-n`, n from 1.

    Attributes:
        entries: keys of the file.
        lost_pages: pages that a truncated file lacks.
        damaged: whether a page is not what the tree says.
    """

    entries: int
    lost_pages: int
    damaged: bool

    def largest_number(self, kind: str) -> int:
        """Largest n among the keys of what a damaged file still holds, 0 for a whole one."""

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values of keys, None where there is none."""

    def records(self, kind: str, numbers: Sequence[int] | np.ndarray, digits: int = 9) -> list[bytes | None]:
        """Values of `kind-n`, n written with `digits` places; None where there is none."""

    def prefetch(self, kind: str, numbers: Sequence[int] | np.ndarray, digits: int = 9) -> None:
        """Tell the system which records are read next."""

    def survey(self, kind: str, digits: int, first: int, last: int) -> tuple[int, int, int, int, int]:
        """The fields of `Survey`."""

    def first_key(self, prefix: bytes) -> bytes | None:
        """The first key with a prefix."""


@dataclass(frozen=True)
class Survey:
    """What the keys `kind`-n of a file are.

    Attributes:
        total: keys of the kind, whatever follows the hyphen.
        formed: those of the form asked for: n written with `digits` places, or more where it needs more.
        lowest: smallest n of these.
        highest: largest n of these.
        inside: those of these with first <= n <= last.
    """

    total: int
    formed: int
    lowest: int
    highest: int
    inside: int


class _PackageReader:
    """The compiled reader's interface on the `lmdb` package, which takes whole files only."""

    lost_pages, damaged = 0, False

    def __init__(self, path: str) -> None:
        import lmdb

        self._env = lmdb.open(
            os.fsencode(path), subdir=False, readonly=True, lock=False, readahead=False, meminit=False
        )
        found = self._env.stat()
        self.entries = found["entries"]
        self.pid = os.getpid()
        pages, there = self._env.info()["last_pgno"] + 1, os.path.getsize(path) // found["psize"]
        if there < pages:  # the package would end the process at the first key beyond
            self.close()
            raise ConfigError(
                f"expected a whole LMDB data file at {path}, got {there} of {pages} pages; a truncated file needs the "
                "compiled reader"
            )

    def largest_number(self, kind: str) -> int:
        """0: of whole files nothing is listed."""
        return 0

    def close(self) -> None:
        self._env.close()

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        with self._env.begin(buffers=True) as transaction:
            return [None if (value := transaction.get(key)) is None else bytes(value) for key in keys]

    def records(self, kind: str, numbers: Sequence[int] | np.ndarray, digits: int = 9) -> list[bytes | None]:
        return self.get([b"%s-%0*d" % (kind.encode(), digits, number) for number in numbers])

    def prefetch(self, kind: str, numbers: Sequence[int] | np.ndarray, digits: int = 9) -> None:
        """Nothing: only reading would bring the pages in."""

    def survey(self, kind: str, digits: int, first: int, last: int) -> tuple[int, int, int, int, int]:
        form = re.compile(rb"%s-(\d{%d}|[1-9]\d{%d,17})" % (kind.encode(), digits, digits))
        keys = list(self._keys(kind.encode() + b"-"))
        numbers = [int(match[1]) for key in keys if (match := form.fullmatch(key))]
        inside = sum(first <= number <= last for number in numbers)
        return len(keys), len(numbers), min(numbers, default=0), max(numbers, default=0), inside

    def first_key(self, prefix: bytes) -> bytes | None:
        return next(self._keys(prefix), None)

    def _keys(self, prefix: bytes) -> Iterator[bytes]:
        """Keys with a prefix, in order."""
        with self._env.begin() as transaction, transaction.cursor() as cursor:
            if cursor.set_range(prefix):
                yield from takewhile(lambda key: key.startswith(prefix), cursor.iternext(values=False))


#: The package refuses to open a file twice in a process, so that readers of one file share theirs; after a
#: fork the one inherited from the parent still counts and has to be closed first.
_shared: weakref.WeakValueDictionary[str, _PackageReader] = weakref.WeakValueDictionary()
_sharing = threading.Lock()


def _package_reader(path: str, why: str) -> _Reader:
    import lmdb

    key = os.path.realpath(path)
    with _sharing:
        if (found := _shared.get(key)) is not None:
            if found.pid == os.getpid():
                return found
            found.close()
        _log.warning("%s is read with the lmdb package: %s", path, why)
        try:
            made = _shared[key] = _PackageReader(path)
        except lmdb.Error as error:
            raise ConfigError(f"expected an LMDB data file at {path}: {why}; {error}") from error
    return made


def _open(path: str) -> _Reader:
    try:
        from rcmstr_fast import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return _package_reader(path, f"the compiled reader is missing ({error})")
    try:
        return _C.LmdbReader(os.fsencode(path))  # names are bytes: they need not be UTF-8
    except _C.LmdbUnsupported as error:
        return _package_reader(path, str(error))
    except _C.LmdbError as error:
        raise ConfigError(f"expected an LMDB data file at {path}: {error}") from error


class LmdbFile:
    """Values of one LMDB data file; picklable and safe across fork, since each process opens it for itself.

    Attributes:
        path: of the data file (`data.mdb`).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._opened: tuple[int, _Reader] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None}

    def _reader(self) -> _Reader:
        opened = self._opened
        if opened is None or opened[0] != os.getpid():
            opened = self._opened = (os.getpid(), _open(self.path))
        return opened[1]

    @property
    def entries(self) -> int:
        """Keys in the database, as the file itself says."""
        return self._reader().entries

    @property
    def lost_pages(self) -> int:
        """Pages that a truncated file does not have."""
        return self._reader().lost_pages

    @property
    def damaged(self) -> bool:
        """Whether the way to a key asked for was lost, so that it is looked for on all pages that are left."""
        return self._reader().damaged

    def largest_number(self, kind: str) -> int:
        """The largest number of a key `kind-%09d` in a damaged file; 0: none, or not (known to be) damaged."""
        return self._reader().largest_number(kind)

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values of the keys; None where a key is absent or cannot be read.

        Raises:
            ConfigError: the file is no LMDB data file.
        """
        return self._reader().get(keys)

    def records(self, kind: str, numbers: Sequence[int] | np.ndarray, digits: int = 9) -> list[bytes | None]:
        """Values of the keys `kind-n`, n with that many digits or more; None as in `get`.

        Raises:
            ConfigError: the file is no LMDB data file.
        """
        return self._reader().records(kind, numbers, digits)

    def prefetch(self, kind: str, numbers: Sequence[int] | np.ndarray, digits: int = 9) -> None:
        """Ask the kernel to bring what `records` will read into memory; without the GIL.

        Raises:
            ConfigError: the file is no LMDB data file.
        """
        self._reader().prefetch(kind, numbers, digits)

    def survey(self, kind: str, digits: int, first: int = 0, last: int = 0) -> Survey:
        """Count the keys of a kind; reads a large part of the file's directory.

        Args:
            kind: image or label.
            digits: places of the numbers in the keys that count as formed.
            first: first number that counts as inside.
            last: last one.
        """
        return Survey(*self._reader().survey(kind, digits, first, last))

    def first_key(self, prefix: bytes) -> bytes | None:
        """The first key, in the order of bytes, that begins with the prefix; None where there is none."""
        return self._reader().first_key(prefix)
