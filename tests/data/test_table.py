"""Tables are read back exactly by pandas and by the csv module, whatever the cells hold."""

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcmstr_fast.data.table import to_tsv

HEAD = ["name", "label", "prediction"]
ODD = [
    '5"',
    "a\tb",
    "a\nb",
    "a\rb",
    "a\r\nb",
    '"x"',
    '""',
    "=1+1",
    "NA",
    "nan",
    "",
    " ",
    "'",
    "\\",
    "a,b",
    "#",
    "中",
    "1.0",
]


def by_pandas(text):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(io.BytesIO(text.encode()), sep="\t", dtype=str, keep_default_na=False)
    return [list(frame.columns), *frame.values.tolist()]


def test_odd_cells():
    rows = [[cell, other, "x"] for cell in ODD for other in ODD[:6]]
    assert by_pandas(to_tsv([HEAD, *rows])) == [HEAD, *rows]
    assert list(csv.reader(io.StringIO(to_tsv([HEAD, *rows]), newline=""), delimiter="\t")) == [HEAD, *rows]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=3, max_size=3)
    )
)
def test_any_cells(rows):
    rows = [[f"n{i}", *row[1:]] for i, row in enumerate(rows)]  # names of records are never empty
    assert by_pandas(to_tsv([HEAD, *rows])) == [HEAD, *rows]
