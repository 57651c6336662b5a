"""The same pictures in several sets, by content: a hash of the encoded bytes of every record, kept in a cache."""

import hashlib
import io
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from rcmstr_fast import env
from rcmstr_fast.data.progress import in_threads, progress
from rcmstr_fast.data.sets import FolderSet, ImageSet
from rcmstr_fast.data.source import ImageSource

_SHOWN = 3
#: Values that are no hash: not computed yet, and no picture (a missing, unreadable or empty record).
UNKNOWN, NOTHING = 0, 1

_log = logging.getLogger(__name__)


def content_hashes(source: ImageSource, records: np.ndarray | None = None, *, threads: int = 0) -> np.ndarray:
    """64-bit hashes (BLAKE2b) of the encoded pictures of records.

    Two different pictures share one with probability 2^-64: among ten million records there is such a pair once in
    400,000 data sets. What was hashed before is taken from `env.cache_folder()`, where it lies by the path
    of the set; it counts as long as the sizes and times of the files stay.

    Args:
        source: the records.
        records: [n] int64 record numbers; None: all.
        threads: reading threads; 0: as many as `env.threads()`.
    Returns:
        [n] uint64; `NOTHING` where there is no picture.
    """
    wanted = np.arange(len(source)) if records is None else np.asarray(records, np.int64)
    hashes = np.zeros(len(source), np.uint64)
    first = 0
    for found in source.sets:
        part = hashes[first : first + len(found)]
        inside = wanted[(wanted >= first) & (wanted < first + len(found))] - first
        first += len(found)
        if not inside.size:
            continue
        stamp = _stamp(found)
        known = _load(found, stamp)
        part[:] = known if known is not None else UNKNOWN
        missing = np.unique(inside[part[inside] == UNKNOWN])
        if missing.size:
            _fill(found, part, missing, threads)
            _save(found, stamp, part)
    return hashes[wanted]


def _fill(found: ImageSet, hashes: np.ndarray, missing: np.ndarray, threads: int) -> None:
    def part(chunk: range) -> tuple[np.ndarray, list[int]]:
        places = missing[chunk.start : chunk.stop]
        found.prefetch(places)
        return places, [_hash(data) for data in found.read(places)]

    for places, values in in_threads(part, len(missing), threads, f"hashing {found.name}"):
        hashes[places] = np.asarray(values, np.uint64)


def _hash(data: bytes | None) -> int:
    if not data:
        return NOTHING
    return max(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"), NOTHING + 1)


def _stamp(found: ImageSet) -> str:
    """Changes when the files of a set change."""
    digest = hashlib.blake2b(digest_size=16)
    paths = [found.path]
    if isinstance(found, FolderSet):
        paths = [found.record_name(i) for i in range(len(found))]
    for path in progress(paths, len(paths), f"looking at {found.name}", "files"):
        try:
            status = os.stat(path)
            digest.update(b"%s\0%d\0%d\0" % (os.fsencode(path), status.st_size, status.st_mtime_ns))
        except OSError:
            digest.update(os.fsencode(path) + b"\0-")
    return digest.hexdigest()


def _cache_file(found: ImageSet) -> Path:
    name = hashlib.blake2b(os.fsencode(os.path.realpath(found.path)), digest_size=16).hexdigest()
    return env.cache_folder() / "pictures" / f"{name}.npz"


def _load(found: ImageSet, stamp: str) -> np.ndarray | None:
    try:
        with np.load(_cache_file(found), allow_pickle=False) as stored:
            hashes = stored["hashes"]
            sound = str(stored["stamp"]) == stamp and hashes.shape == (len(found),) and hashes.dtype == np.uint64
            return hashes if sound else None
    except Exception:  # none yet, or damaged in any way: a cache is made again
        return None


def _save(found: ImageSet, stamp: str, hashes: np.ndarray) -> None:
    file = _cache_file(found)
    content = io.BytesIO()
    np.savez(content, stamp=stamp, hashes=hashes)
    partial = file.with_name(f"{file.stem}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.getvalue())
        partial.replace(file)
    except OSError as error:
        _log.debug("the hashes of %s are not kept: %s", found.path, error)
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Overlap:
    """Pictures of one set that another one has, too.

    Attributes:
        one: name of the first set.
        other: name of the second.
        count: records of `other` whose picture is in `one`.
        total: records of `other`.
        examples: names of the first of these, each with a record of `one` with the same picture.
    """

    one: str
    other: str
    count: int
    total: int
    examples: list[tuple[str, str]]

    def __str__(self) -> str:
        name, twin = self.examples[0]
        return f"{self.count} of {self.total} pictures of {self.other} are in {self.one}, such as {name} (there {twin})"


@dataclass
class OverlapReport:
    """Result of `find_overlap`.

    Attributes:
        pairs: two sets with pictures in common; pairs without are left out.
        repeated: name of a set -> records whose picture an earlier record of the set has.
    """

    pairs: list[Overlap] = field(default_factory=list)
    repeated: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join(str(pair) for pair in self.pairs)


def find_overlap(
    sources: Mapping[str, ImageSource],
    records: Mapping[str, np.ndarray] | None = None,
    *,
    between: Iterable[tuple[str, str]] | None = None,
    threads: int = 0,
) -> OverlapReport:
    """Which sets have pictures in common, and which repeat their own.

    Args:
        sources: name of the set -> its source; the same source may stand under several names.
        records: name -> [n] int64 record numbers of the set in its source; a set without an entry is all of it.
        between: pairs of names to compare; None: all.
        threads: as in `content_hashes`.
    """
    chosen = {name: np.asarray((records or {}).get(name, np.arange(len(sources[name])))) for name in sources}
    hashes = {name: content_hashes(sources[name], chosen[name], threads=threads) for name in sources}
    report = OverlapReport()
    for name, values in hashes.items():
        real = values[values != NOTHING]
        if repeated := len(real) - len(np.unique(real)):
            report.repeated[name] = repeated
    for one, other in between if between is not None else combinations(sources, 2):
        values, first = np.unique(hashes[one], return_index=True)
        shared = np.flatnonzero(np.isin(hashes[other], values) & (hashes[other] != NOTHING))
        if shared.size:
            twins = first[np.searchsorted(values, hashes[other][shared[:_SHOWN]])]
            examples = [
                (sources[other].name(int(chosen[other][i])), sources[one].name(int(chosen[one][j])))
                for i, j in zip(shared, twins)
            ]
            report.pairs.append(Overlap(one, other, len(shared), len(chosen[other]), examples))
    return report


def files_given_twice(source: ImageSource) -> list[str]:
    """One line for each two sets of a source (or one set) that hold the same files: a root given twice, a root and its
    own subfolder, links; without reading any picture."""
    seen: dict[tuple[int, int], tuple[str, str]] = {}
    pairs: dict[tuple[str, str], list[int]] = {}
    examples: dict[tuple[str, str], str] = {}
    for found in source.sets:
        files = [(found.path, len(found))]
        if isinstance(found, FolderSet):
            files = [(found.record_name(i), 1) for i in range(len(found))]
        for path, count in progress(files, len(files), f"looking at {found.name}", "files"):
            try:
                status = os.stat(path)
            except OSError:
                continue
            key = status.st_dev, status.st_ino
            if key not in seen:
                seen[key] = found.path, path
                continue
            pair = seen[key][0], found.path
            pairs.setdefault(pair, []).append(count)
            examples.setdefault(pair, f"{path} is {seen[key][1]}")
    return [
        f"{sum(counts)} pictures are given twice, in {one} and in {other}, and shown twice as often: "
        f"{examples[one, other]}"
        for (one, other), counts in pairs.items()
    ]
