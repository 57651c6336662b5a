"""One flat list of word images over LMDBs and folders of images."""

import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.lmdb_read import LmdbFile

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_UNLABELLED = "[Unlabeled_data]"
_LABELS_FILE = "labels.tsv"
_PROBED = 100
_MAX_FILE_BYTES = 64 << 20
#: What a record of an LMDB can have keys of.
_KINDS = ("image", "label", "wh")
_MOST = 999_999_999

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

    def labels(self, indices: Sequence[int]) -> list[str | None]:
        """Labels; None where there is none."""


class LmdbSet:
    """Records 1 to num-samples of an LMDB in the scene-text layout."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path
        self._file = LmdbFile(path)
        self._size = self._count()

    def _count(self) -> int:
        file = self._file
        (text,) = file.get([b"num-samples"])
        if file.lost_pages or file.damaged:
            _log.warning(
                "%s is damaged or a part of a copy, %d of its pages are missing; records that cannot be found are broken",
                self.path, file.lost_pages,
            )  # fmt: skip
        if largest := file.largest_number("image"):
            return self._count_damaged(text, largest)
        if text is None:
            raise ConfigError(f"expected the key num-samples in {self.path}, got {file.entries} keys without it")
        if not re.fullmatch(rb"\s*\d{1,15}\s*", text) or (size := int(text)) < 1:
            raise ConfigError(f"expected num-samples of 1 or more in {self.path}, got {text[:30]!r}")
        first = file.records("image", range(1, min(size, _PROBED) + 1))
        if not file.lost_pages and not any(value is not None for value in first):
            raise ConfigError(f"expected keys image-000000001, .. in {self.path}, got none of the first {_PROBED}")
        if size > file.entries:
            _log.warning("%s: num-samples is %d, but there are %d keys", self.path, size, file.entries)
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
        return f"{self.path}:image-{i + 1:09d}"

    def read(self, indices: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """Encoded images; None where a record is missing or cannot be read."""
        return self._file.records("image", np.asarray(indices, np.int64) + 1)

    def prefetch(self, indices: np.ndarray) -> None:
        """Ask the kernel for the pages of the encoded images."""
        self._file.prefetch("image", indices + 1)

    def labels(self, indices: Sequence[int]) -> list[str | None]:
        """Labels; None where the key is absent, empty, marked as unlabelled or not UTF-8."""
        return [self._label(i, v) for i, v in zip(indices, self._file.records("label", [i + 1 for i in indices]))]

    def _label(self, i: int, value: bytes | None) -> str | None:
        try:
            return _or_none(value.decode()) if value else None
        except UnicodeDecodeError as error:
            _log.warning("%s: its label is not UTF-8: %s", self.record_name(i), error)
            return None


class FolderSet:
    """Image files below a folder, sorted, with an optional labels.tsv (file, tab, label; UTF-8) in it."""

    def __init__(self, name: str, path: str, files: list[str]) -> None:
        self.name, self.path = name, path
        self._files = files
        self._labels: dict[str, str] | None = None

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

    def labels(self, indices: Sequence[int]) -> list[str | None]:
        """Labels of labels.tsv; None where a file is not listed.

        Raises:
            ConfigError: a line without a tab, or not UTF-8.
        """
        if self._labels is None:
            self._labels = self._read_labels()
        return [_or_none(self._labels.get(self._files[i], "")) for i in indices]

    def _read_labels(self) -> dict[str, str]:
        path = Path(self.path) / _LABELS_FILE
        found: dict[str, str] = {}
        if not path.is_file():
            return found
        try:
            lines = path.read_text("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"expected UTF-8 in {path}: {error}") from error
        for number, line in enumerate(lines, 1):
            file, tab, label = line.partition("\t")
            if line and not tab:
                raise ConfigError(f"expected 'file<TAB>label' in {path} line {number}, got {line[:60]!r}")
            found[file] = label
        unknown = found.keys() - set(self._files) - {""}
        if unknown:
            _log.warning("%s lists %d files that are not there, such as %s", path, len(unknown), min(unknown))
        return found


def _or_none(label: str) -> str | None:
    return None if label in ("", _UNLABELLED) else label


class ImageSource:
    """Records of all sets in one list, in the order of the roots; picklable (paths only).

    Attributes:
        sets: the LMDBs and folders found.
        sizes: records of each given root.
        root_names: the given roots.
    """

    def __init__(self, roots: Sequence[str], sets_of_roots: Sequence[Sequence[ImageSet]]) -> None:
        self.root_names = list(roots)
        self.sets = [found for sets in sets_of_roots for found in sets]
        self.sizes = [sum(len(found) for found in sets) for sets in sets_of_roots]
        self._starts = np.cumsum([0] + [len(found) for found in self.sets])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, i: int) -> str:
        """Path (and key) of record i."""
        which, inside = self._locate(np.asarray([i]))
        return self.sets[which[0]].record_name(int(inside[0]))

    def read(self, indices: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """Encoded images of the records, in the order asked.

        Args:
            indices: [n] integers in [0, len(self)), repeats allowed.
        Returns:
            n items; None where a record is missing or cannot be read.
        Raises:
            IndexError: an index out of range.
        """
        if len(self.sets) == 1:
            inside = np.asarray(indices, dtype=np.int64)
            self._check(inside)
            return self.sets[0].read(inside)
        result: list[bytes | None] = [None] * len(indices)
        for found, places, inside in self._by_set(indices):
            for place, value in zip(places.tolist(), found.read(inside)):
                result[place] = value
        return result

    def prefetch(self, indices: Sequence[int] | np.ndarray) -> None:
        """Bring the records into memory that `read` will ask for; arguments and errors as there."""
        for found, _, inside in self._by_set(indices):
            found.prefetch(inside)

    def labels(self, indices: Sequence[int] | np.ndarray) -> list[str | None]:
        """Labels of the records, None where unlabelled; arguments and errors as in `read`."""
        result: list[str | None] = [None] * len(indices)
        for found, places, inside in self._by_set(indices):
            for place, value in zip(places.tolist(), found.labels(inside.tolist())):
                result[place] = value
        return result

    def _check(self, indices: np.ndarray) -> None:
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"records are 0 to {len(self) - 1}, got {indices.min()} to {indices.max()}")

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._check(indices)
        which = np.searchsorted(self._starts, indices, side="right") - 1
        return which, indices - self._starts[which]

    def _by_set(self, indices: Sequence[int] | np.ndarray) -> Iterator[tuple[ImageSet, np.ndarray, np.ndarray]]:
        which, inside = self._locate(np.asarray(indices, dtype=np.int64))
        for number in np.unique(which):
            places = np.flatnonzero(which == number)
            yield self.sets[number], places, inside[places]


def open_sources(roots: Sequence[str | Path]) -> ImageSource:
    """Find the records of the given roots.

    Args:
        roots: each an LMDB folder (or its data.mdb), a folder with LMDBs at any depth, or a folder of images
            at any depth; where a folder has both, the LMDBs count.
    Raises:
        ConfigError: a path that does not exist, holds neither, or holds an LMDB that cannot be used.
    """
    if not roots:
        raise ConfigError("expected at least one data root, got none")
    return ImageSource([str(root) for root in roots], [_sets_of(Path(root)) for root in roots])


def _sets_of(root: Path) -> list[ImageSet]:
    if root.is_file():
        return [LmdbSet(root.absolute().parent.name, str(root))]
    if not root.is_dir():
        raise ConfigError(f"expected a folder of images or LMDBs, got {root}, which does not exist")
    databases, images = _walk(root)
    if databases:
        return [LmdbSet(_set_name(root, folder), str(root / folder / "data.mdb")) for folder in databases]
    if not images:
        raise ConfigError(f"expected an LMDB (data.mdb) or images ({' '.join(_SUFFIXES)}) in {root}, found neither")
    return [FolderSet(_set_name(root, "."), str(root), images)]


def _set_name(root: Path, folder: str) -> str:
    return root.absolute().name if folder == "." else folder


def _walk(root: Path) -> tuple[list[str], list[str]]:
    """Folders with a data.mdb and image files below a root, relative to it, sorted, without hidden ones.

    Symbolic links are followed, but each real folder is visited once.
    """
    databases, images, seen = [], [], set()
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        relative = Path(os.path.relpath(folder, root)).as_posix()
        if "data.mdb" in files:
            databases.append(relative)
        prefix = "" if relative == "." else relative + "/"
        images += [prefix + file for file in files if file.lower().endswith(_SUFFIXES) and file[0] != "."]
    return sorted(databases), sorted(images)
