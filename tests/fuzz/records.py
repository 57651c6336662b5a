"""Damaged LMDB files and lists of labels: every record is read, is missing, or the file is refused.

`python -m tests.fuzz.records RECORDS` is the long form for a compiled reader with sanitizers; it needs no torch.
"""

import json
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.source import open_sources
from tests.fuzz.mutate import damaged

RECORDS = 100
#: Most records that are asked of one file, however many it says it has.
_MOST = 400


class Databases:
    """Damaged LMDB files: with values inside of pages, and with values on pages of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seeds, self.values = [], []
        for number, size in enumerate((60, 700, 9000)):
            drawn = random.Random(number)
            values = [drawn.randbytes(size + i % 50) for i in range(RECORDS)]
            write_lmdb(folder / str(number), ((value, f"word {i}") for i, value in enumerate(values)))
            self.seeds.append((folder / str(number) / "data.mdb").read_bytes())
            self.values.append(values)
        self.records: Counter[str] = Counter()

    def attempt(self, drawn: random.Random) -> str:
        which = drawn.randrange(len(self.seeds))
        # The meta pages, the pages of the tree (at the end of so small a file), or anywhere.
        data = damaged(self.seeds[which], drawn, end=drawn.choice((None, None, 8192, 3 * 4096)))
        place = self.folder / "damaged"
        place.mkdir(exist_ok=True)
        (place / "data.mdb").unlink(missing_ok=True)
        (place / "data.mdb").write_bytes(data)
        try:
            source = open_sources([str(place)])
            asked = list(range(min(len(source), _MOST)))
            source.prefetch(asked)
            read, labels = source.read(asked), source.labels(asked)
        except ConfigError as error:
            assert "\n" not in str(error), error
            self.records["refused with their file"] += RECORDS
            return "refused"
        assert len(read) == len(labels) == len(asked)
        for number, value in zip(asked, read, strict=True):
            known = number < RECORDS and value == self.values[which][number]
            self.records["missing" if value is None else "as written" if known else "other bytes"] += 1
        return "taken"


class LabelLists:
    """Damaged labels.tsv beside a few images."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for i in range(20):
            (folder / f"{i:02d} é.png").write_bytes(b"x")
        self.seed = "".join(f"{i:02d} é.png\twörd {i}\n" for i in range(20)).encode()

    def attempt(self, drawn: random.Random) -> str:
        (self.folder / "labels.tsv").write_bytes(damaged(self.seed, drawn))
        try:
            found = open_sources([str(self.folder)]).labels(range(20))
        except ConfigError as error:
            assert "\n" not in str(error), error
            return "refused"
        assert len(found) == 20
        return "taken"


def main(argv: list[str]) -> int:
    """Read so many records of damaged files; prints the counts as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        databases, number = Databases(Path(folder)), 0
        files: Counter[str] = Counter()
        while sum(databases.records.values()) < int(argv[0]):
            files[databases.attempt(random.Random(number))] += 1
            number += 1
    print(json.dumps({"files": files, "records": databases.records}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
