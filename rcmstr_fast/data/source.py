"""One flat list of word images over LMDBs and folders of images."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.lists import MASKS, PAIRS, is_list
from rcmstr_fast.data.names import SUFFIXES, is_picture
from rcmstr_fast.data.sets import FolderSet, ImageSet, LmdbSet

_log = logging.getLogger(__name__)


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

    def raw_labels(self, indices: Sequence[int] | np.ndarray) -> list[bytes | None]:
        """Labels of the records as stored, None where there is none; arguments and errors as in `read`."""
        result: list[bytes | None] = [None] * len(indices)
        for found, places, inside in self._by_set(indices):
            for place, value in zip(places.tolist(), found.raw_labels(inside.tolist())):
                result[place] = value
        return result

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
        roots: each an LMDB folder (or its data file), a folder with LMDBs at any depth, or a folder of images
            at any depth; where a folder has both, the LMDBs count.
    Raises:
        ConfigError: a path that does not exist, holds neither, or holds an LMDB that cannot be used.
    """
    if not roots:
        raise ConfigError("expected at least one data root, got none")
    return ImageSource([str(root) for root in roots], [_sets_of(Path(root)) for root in roots])


def _sets_of(root: Path) -> list[ImageSet]:
    if root.is_file() and root.suffix.lower() == ".zip":
        raise ConfigError(
            f"expected a folder of images or LMDBs, got {root}; `rcmstr data convert {root} FOLDER` makes an LMDB of it"
        )
    if root.is_file():
        return [LmdbSet(root.absolute().parent.name, str(root))]
    if not root.is_dir():
        raise ConfigError(f"expected a folder of images or LMDBs, got {root}, which does not exist")
    found = walk(root)
    if found.databases:
        if found.pictures:
            _log.warning(
                "%s: %d pictures beside the LMDBs are not read, such as %s",
                root,
                len(found.pictures),
                found.pictures[0],
            )
        return [LmdbSet(_set_name(root, path), str(root / path)) for path in found.databases]
    if not found.pictures:
        raise ConfigError(f"expected an LMDB (data.mdb) or images ({' '.join(SUFFIXES)}) in {root}, found neither")
    return [FolderSet(root.absolute().name, str(root), found.pictures, found.lists)]


def _set_name(root: Path, path: str) -> str:
    """The path of a data file below its root, without `data.mdb`; of the root's own, the root's name."""
    folder = path.removesuffix("data.mdb").rstrip("/")
    return folder or root.absolute().name


@dataclass
class Found:
    """What lies below a folder, by path relative to it, sorted.

    Attributes:
        databases: data files of LMDBs: `data.mdb`, or any name that ends with `.lmdb` or `.mdb`.
        pictures: image files.
        lists: files that can be lists of labels: any at the top, below it those with a usual name.
    """

    databases: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)


def walk(root: Path) -> Found:
    """LMDBs, pictures and lists below a folder, without hidden ones and the masks of a folder with pairs.tsv.

    Symbolic links are followed, but each real folder is visited once.
    """
    found, seen = Found(), set()
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        # Masks are not pictures of words.
        masks = MASKS if PAIRS in files else ""
        below[:] = sorted(name for name in below if not name.startswith(".") and name != masks)
        relative = Path(os.path.relpath(folder, root)).as_posix()
        prefix = "" if relative == "." else relative + "/"
        found.databases += [prefix + file for file in files if _is_database(file)]
        found.pictures += [prefix + file for file in files if is_picture(file)]
        found.lists += [prefix + file for file in files if is_list(file, known=bool(prefix))]
    for paths in (found.databases, found.pictures, found.lists):
        paths.sort()
    return found


def _is_database(file: str) -> bool:
    if file == "data.mdb":
        return True
    return file.endswith((".mdb", ".lmdb")) and file != "lock.mdb" and not file.startswith(".")
