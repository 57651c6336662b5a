"""The numbers that the papers print, to stand beside ours: `published.json` of this package, a table a name.

The tables are those of RCMSTR (`rcmstr_1`, `rcmstr_2`, `rcmstr_4`, `rcmstr_6`) and of SeqCLR (`seqclr_1` to
`seqclr_4`); the number is that of the table in the paper. They are copied as printed, also where a printed average is
not the mean of its row.
"""

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from rcmstr_fast.config import ConfigError


@dataclass(frozen=True)
class PublishedRow:
    """One printed row.

    Attributes:
        key: name for programs; for methods that this package has, that of the recipes (`ere_intra`, `rclstr`).
        name: as a table shows it.
        values: column -> number; columns that the paper leaves empty are missing.
        average: as printed; None where none is.
        encoder: cnn or vit; empty where the paper names none.
        decoder: ctc, attention or transformer; empty where the paper names none.
        group: part of the table, where it has parts (a to d of the ablations, the data set of the error rates).
    """

    key: str
    name: str
    values: dict[str, float]
    average: float | None = None
    encoder: str = ""
    decoder: str = ""
    group: str = ""


@dataclass(frozen=True)
class PublishedTable:
    """One printed table.

    Attributes:
        name: of this table here, such as `rcmstr_1`.
        title: what it compares.
        source: authors and title of the paper.
        place: the table's number in the paper.
        metric: what the numbers are, with the unit.
        columns: in the printed order.
        averaged: the columns whose mean the printed average is.
        rows: in the printed order.
        note: what a reader must know about the numbers; empty: nothing.
    """

    name: str
    title: str
    source: str
    place: str
    metric: str
    columns: tuple[str, ...]
    averaged: tuple[str, ...]
    rows: tuple[PublishedRow, ...]
    note: str = ""

    def find(self, key: str, *, encoder: str = "", decoder: str = "") -> PublishedRow | None:
        """The first row with this key; an empty encoder or decoder takes any. None where the paper has no such row."""
        for row in self.rows:
            if row.key == key and encoder in ("", row.encoder) and decoder in ("", row.decoder):
                return row
        return None


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    text = files("rcmstr_fast.evaluation").joinpath("published.json").read_text(encoding="utf-8")
    return json.loads(text)


def names() -> tuple[str, ...]:
    """Names of all tables."""
    return tuple(_tables())


def table(name: str) -> PublishedTable:
    """A printed table by name.

    Args:
        name: of `names()`, such as `rcmstr_1` for Table I of RCMSTR.
    Raises:
        ConfigError: there is no such table.
    """
    found = _tables().get(name)
    if found is None:
        raise ConfigError(f"published table must be of {', '.join(names())}, got {name!r}")
    columns = tuple(found["columns"])
    return PublishedTable(
        name=name,
        title=found["title"],
        source=found["source"],
        place=found["place"],
        metric=found["metric"],
        columns=columns,
        averaged=tuple(found.get("averaged", columns)),
        rows=tuple(PublishedRow(**row) for row in found["rows"]),
        note=found.get("note", ""),
    )
