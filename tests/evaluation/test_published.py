"""The papers' tables load, are whole, and their averages are the means of their rows."""

from collections import Counter

import pytest

from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation import published

#: (table, key, decoder or group) whose printed average is not the mean of the printed numbers -> by how much at most
PRINTED_OTHERWISE = {
    ("rcmstr_2", "supervised", "transformer"): 0.013,
    ("seqclr_3", "chowdhury", "RIMES"): 0.051,
    ("seqclr_3", "seqclr", "RIMES"): 0.401,
}
ROWS = {
    "rcmstr_1": 24,
    "rcmstr_2": 9,
    "rcmstr_4": 3,
    "rcmstr_6": 12,
    "seqclr_1": 10,
    "seqclr_2": 12,
    "seqclr_3": 10,
    "seqclr_4": 36,
}


def test_every_table_is_there():
    assert {name: len(published.table(name).rows) for name in published.names()} == ROWS


@pytest.mark.parametrize("name", ROWS)
def test_rows_have_known_columns_and_one_place(name):
    found = published.table(name)
    places = Counter((row.key, row.encoder, row.decoder, row.group) for row in found.rows)
    assert [place for place, count in places.items() if count > 1] == []
    for row in found.rows:
        assert row.values and set(row.values) <= set(found.columns)
        assert list(row.values) == [column for column in found.columns if column in row.values]
        assert all(0 <= value <= 100 for value in row.values.values())
    assert found.title and found.source and found.place and found.metric and set(found.averaged) <= set(found.columns)


@pytest.mark.parametrize("name", ROWS)
def test_averages_are_the_means(name):
    found = published.table(name)
    for row in found.rows:
        if row.average is not None:
            mean = sum(row.values[column] for column in found.averaged) / len(found.averaged)
            allowed = PRINTED_OTHERWISE.get((name, row.key, row.decoder or row.group), 0.0051)
            assert row.average == pytest.approx(mean, abs=allowed), row
            assert allowed < 0.01 or abs(row.average - mean) > 0.0051, f"{row.key} needs no allowance"


def test_a_row_is_found_by_method_encoder_and_decoder():
    first = published.table("rcmstr_1")
    assert first.find("rcmstr", encoder="cnn", decoder="attention").values["IIIT5K"] == 70.0
    assert first.find("rcmstr", encoder="vit").average == 58.69
    assert first.find("seqclr", decoder="ctc").average is None and first.find("byol") is None


def test_an_unknown_table_is_one_line():
    with pytest.raises(ConfigError, match="got 'rcmstr_3'"):
        published.table("rcmstr_3")
