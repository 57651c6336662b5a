"""Tab-separated tables whose cells may hold anything, in one form that pandas and the csv module read back exactly."""

from collections.abc import Iterable, Sequence

_QUOTED = frozenset('\t\n\r"')


def to_tsv(rows: Iterable[Sequence[object]]) -> str:
    """Rows as lines that end with a line feed, cells apart by tabs.

    A cell with a tab, a line feed, a carriage return or a quote stands in quotes, its own quotes doubled (RFC 4180 with
    tabs). `pandas.read_csv(path, sep="\\t", dtype=str, keep_default_na=False)` and
    `csv.reader(open(path, newline=""), delimiter="\\t")` read it back.
    """
    return "".join("\t".join(map(_cell, row)) + "\n" for row in rows)


def _cell(value: object) -> str:
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if _QUOTED & set(text) else text
