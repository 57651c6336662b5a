"""Kinds of sets of word images: an LMDB in the scene-text layout, and a folder of pictures."""

import logging
import os
import re
import stat
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.lists import Listing, read_lists
from rcmstr_fast.data.lmdb_read import LmdbFile
from rcmstr_fast.data.names import Names
from rcmstr_fast.data.text import guess_encoding

#: Label of records without one, beside an empty one and none.
UNLABELLED = b"[Unlabeled_data]"
_MAX_FILE_BYTES = 64 << 20
#: What a record of an LMDB can have keys of.
_KINDS = ("image", "label", "wh")
_DIGITS, _MOST = 9, 999_999_999

_log = logging.getLogger(__name__)


class ImageSet(Protocol):
    """One LMDB or one folder of images.

    Attributes:
        name: path relative to the given root; of the root itself its last component.
        path: of the data file or the folder.
    """

    name: str
    path: str

    def __len__(self) -> int: ...

    def record_name(self, i: int) -> str:
        """Name of the i-th record, for messages."""

    def read(self, indices: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """Encoded images; None where a record is missing or cannot be read."""

    def prefetch(self, indices: np.ndarray) -> None:
        """Bring what `read` needs into memory, as far as the kind of set can."""

    def raw_labels(self, indices: Sequence[int]) -> list[bytes | None]:
        """Labels as stored, also what is not UTF-8; None where there is none."""

    def labels(self, indices: Sequence[int]) -> list[str | None]:
        """Labels; None where there is none."""


class _Set:
    """What the kinds share: labels as text out of labels as bytes."""

    path: str
    _told = False

    def raw_labels(self, indices: Sequence[int]) -> list[bytes | None]:
        """As in `ImageSet`."""
        raise NotImplementedError

    def record_name(self, i: int) -> str:
        """As in `ImageSet`."""
        raise NotImplementedError

    def labels(self, indices: Sequence[int]) -> list[str | None]:
        """Labels; None where there is none, it is empty, marked as unlabelled or not UTF-8 (one line in the log)."""
        result: list[str | None] = []
        wrong: dict[int, bytes] = {}
        for i, value in zip(indices, self.raw_labels(indices)):
            if value is None or value in (b"", UNLABELLED):
                result.append(None)
                continue
            try:
                result.append(value.decode())
            except UnicodeDecodeError:
                wrong[i] = value
                result.append(None)
        if wrong and not self._told:
            self._told = True
            _log.warning(
                "%s: %d labels are not UTF-8 (they look like %s) and count as missing, such as that of %s; "
                "`rcmstr data convert --mend` mends them",
                self.path,
                len(wrong),
                guess_encoding(wrong.values()),
                self.record_name(next(iter(wrong))),
            )
        return result


class LmdbSet(_Set):
    """Records of an LMDB in the scene-text layout: image-%09d from 1 to num-samples, and what departs from it."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path
        self._file = LmdbFile(path)
        self._digits, self._first = _DIGITS, 1
        self._size = self._count()

    def _count(self) -> int:
        file = self._file
        (text,) = file.get([b"num-samples"])
        told = int(text) if text is not None and re.fullmatch(rb"\s*\d{1,15}\s*", text) else 0
        if file.lost_pages or file.damaged:
            _log.warning(
                "%s is damaged or a part of a copy, %d of its pages are missing; "
                "records that cannot be found are broken",
                self.path,
                file.lost_pages,
            )
        if largest := file.largest_number("image"):
            return self._count_damaged(text, largest)
        if file.lost_pages and told:
            return told
        key = file.first_key(b"image-")
        form = re.fullmatch(rb"image-(\d{1,18})", key or b"")
        if form is None:
            some = file.first_key(b"")
            raise ConfigError(
                f"expected keys image-000000001, .. in {self.path}, got {file.entries} keys"
                + (f" such as {key or some!r}" if some is not None else "")
            )
        self._digits = len(form[1])
        ends = file.records("image", [told, told + 1])
        if told and self._digits == _DIGITS and int(form[1]) and ends[0] is not None and ends[1] is None:
            return told
        return self._count_odd(text, told)

    def _count_odd(self, text: bytes | None, told: int) -> int:
        """Records of a file whose keys are not image-%09d from 1 to num-samples; says what is there and read."""
        found = self._file.survey("image", self._digits)
        if told:
            if found.lowest > told:
                self._first = found.lowest
            elif found.lowest == 0 and self._file.records("image", [told], self._digits)[0] is None:
                self._first = 0
            size = told
        else:
            self._first = min(found.lowest, 1)
            size = found.highest - self._first + 1
        last = self._first + size - 1
        read = self._file.survey("image", self._digits, self._first, last).inside
        key = f"image-{{:0{self._digits}d}}".format
        if read < size or read < found.total or not told or self._first != 1 or self._digits != _DIGITS:
            _log.warning(
                "%s: %s, and %d pictures are there, %s to %s; records %s to %s are read: %d pictures missing, "
                "%d pictures not reached",
                self.path,
                "no num-samples" if text is None else f"num-samples is {text[:30]!r}",
                found.total,
                key(found.lowest),
                key(found.highest),
                key(self._first),
                key(last),
                size - read,
                found.total - read,
            )
        return size

    def _count_damaged(self, text: bytes | None, largest: int) -> int:
        """Records of a file of which parts are lost: what it says itself, or by the number of its keys."""
        if text is not None and re.fullmatch(rb"\s*\d{1,9}\s*", text):
            told = int(text)
        else:  # one key is num-samples
            told = (self._file.entries - 1) // sum(self._file.largest_number(kind) > 0 for kind in _KINDS)
        return min(max(told, largest), _MOST)

    def __len__(self) -> int:
        return self._size

    def record_name(self, i: int) -> str:
        """Path of the data file and key."""
        return f"{self.path}:image-{i + self._first:0{self._digits}d}"

    def read(self, indices: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """Encoded images; None where a record is missing or cannot be read."""
        return self._file.records("image", np.asarray(indices, np.int64) + self._first, self._digits)

    def prefetch(self, indices: np.ndarray) -> None:
        """Ask the kernel for the pages of the encoded images."""
        self._file.prefetch("image", indices + self._first, self._digits)

    def raw_labels(self, indices: Sequence[int]) -> list[bytes | None]:
        """Labels as stored; None where the key is absent."""
        return self._file.records("label", [i + self._first for i in indices], self._digits)


class FolderSet(_Set):
    """Image files below a folder, sorted, with the labels of the lists at its top."""

    def __init__(self, name: str, path: str, files: list[str], lists: Sequence[str] = ()) -> None:
        """Keep the names; nothing is read yet.

        Args:
            name: of the set.
            path: of the folder.
            files: pictures, relative to it.
            lists: other files, relative to it, that may be lists of labels.
        """
        self.name, self.path = name, path
        self._files, self._lists = files, list(lists)
        self._listing: Listing | None = None

    def __len__(self) -> int:
        return len(self._files)

    def record_name(self, i: int) -> str:
        """Path of the file."""
        return os.path.join(self.path, self._files[i])

    def read(self, indices: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """Contents of the files; None where one cannot be read."""
        return [self._contents(int(i)) for i in indices]

    def prefetch(self, indices: np.ndarray) -> None:
        """Nothing: files are read in many threads anyway."""

    def _contents(self, i: int) -> bytes | None:
        """None also for what is no file (a pipe would be waited for) and for files that fill the memory."""
        try:
            with open(
                self.record_name(i), "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)
            ) as file:
                status = os.fstat(file.fileno())
                usable = stat.S_ISREG(status.st_mode) and status.st_size <= _MAX_FILE_BYTES
                return file.read() if usable else None
        except OSError:
            return None

    @property
    def listing(self) -> Listing:
        """What the lists at the top of the folder say; read at the first use, when a line in the log says so."""
        if self._listing is None:
            self._listing = read_lists(Names([*self._files, *self._lists]), self._list_contents)
            if self._listing.lists:
                level = logging.WARNING if self._listing.problems else logging.INFO
                _log.log(level, "%s: %s", self.path, self._listing.describe())
            below = [name for name in self._lists if "/" in name]
            if below and not self._listing.lists:
                _log.warning(
                    "%s: %d lists of labels in folders below are not read, such as %s; give these folders themselves",
                    self.path,
                    len(below),
                    below[0],
                )
        return self._listing

    def _list_contents(self, name: str) -> bytes:
        with open(os.path.join(self.path, name), "rb") as file:
            return file.read()

    def raw_labels(self, indices: Sequence[int]) -> list[bytes | None]:
        """Labels of the lists; None where a file is not listed."""
        labels = [self.listing.labels.get(self._files[i]) for i in indices]
        return [None if label is None else label.encode("utf-8", "surrogateescape") for label in labels]
