"""Writes the LMDB layout that scene-text projects share: image-%09d, label-%09d, num-samples."""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import lmdb

from rcmstr_fast.config import ConfigError

_BATCH = 1000
_FIRST_MAP_SIZE = 1 << 26


def write_lmdb(folder: str | Path, records: Iterable[tuple[bytes, str | None]]) -> int:
    """Write encoded images and labels to a new LMDB folder.

    `num-samples` is written last, so that an interrupted conversion is recognised as incomplete.

    Args:
        folder: created where it is missing; must not hold a database.
        records: (encoded image, label) in order; None: no label entry.
    Returns:
        Number of records written.
    Raises:
        ConfigError: the folder already holds a database.
    """
    folder = Path(folder)
    if (folder / "data.mdb").exists():
        raise ConfigError(f"expected a folder without a database to write to, got {folder} with a data.mdb")
    folder.mkdir(parents=True, exist_ok=True)
    written = 0
    with lmdb.open(os.fsencode(folder), map_size=_FIRST_MAP_SIZE) as env:
        iterator = iter(records)
        while batch := list(islice(iterator, _BATCH)):
            _put(env, list(_entries(batch, written + 1)))
            written += len(batch)
        _put(env, [(b"num-samples", b"%d" % written)])
    return written


def _entries(batch: list[tuple[bytes, str | None]], first: int) -> Iterator[tuple[bytes, bytes]]:
    for number, (image, label) in enumerate(batch, first):
        yield b"image-%09d" % number, image
        if label is not None:
            yield b"label-%09d" % number, label.encode()


def _put(env: lmdb.Environment, entries: list[tuple[bytes, bytes]]) -> None:
    """One transaction; where the map is full it is doubled and the transaction repeated."""
    while True:
        try:
            with env.begin(write=True) as transaction:
                for key, value in entries:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])
