"""Tables, CSV and JSON of results."""

import csv
import io
import json

import pytest

from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation.metrics import Score
from rcmstr_fast.evaluation.report import (
    RunResult,
    SetResult,
    from_json,
    load_result,
    table,
    to_csv,
    to_json,
)


def result(model="pretrained", accuracy=0.5, kept=8):
    one = SetResult("A", "dtrb36", 10, {"longer than 25 characters": 2}, Score(kept, accuracy, 0.75, 0.9, 0.1, 0.5))
    two = SetResult("B,b", "dtrb36", 2, {}, Score(2, 1.0, 1.0, 1.0, 0.0, 0.0))
    return RunResult(
        model, [one, two, SetResult("A", "exact", 10, {}, Score(10, 0.2, 0.3, 0.4, 0.5, 0.6))], {"step": 3}
    )


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_has_every_number():
    lines = table(result()).splitlines()
    assert len({len(line) for line in lines}) == 1
    head = ["set", "protocol", "N kept", "emptied", "N total", "accuracy %", "ED1 %", "1-NED %", "CER %", "WER %"]
    assert cells(lines[0]) == head
    assert cells(lines[2]) == ["A", "dtrb36", "8", "0", "10", "50.00", "75.00", "90.00", "10.00", "50.00"]
    assert cells(lines[4])[:6] == ["mean", "dtrb36", "10", "0", "12", "75.00"]
    assert cells(lines[5])[:6] == ["weighted mean", "dtrb36", "10", "0", "12", "60.00"]
    assert cells(lines[6])[:6] == ["A", "exact", "10", "0", "10", "20.00"]


def test_csv():
    rows = list(csv.DictReader(io.StringIO(to_csv([result(), result("random", 0.25)]))))
    assert len(rows) == 2 * (2 + 2 + 1 + 2)
    assert rows[1]["set"] == "B,b" and rows[1]["n_kept"] == "2"
    assert float(rows[7]["accuracy"]) == 0.25 and rows[7]["model"] == "random"


def test_json_round_trip(tmp_path):
    text = to_json(result())
    assert from_json(text) == result()
    assert json.loads(text)["means"]["dtrb36"]["weighted_mean"]["accuracy"] == pytest.approx(0.6)
    (tmp_path / "results.json").write_text(text)
    assert load_result(tmp_path) == result()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sets": [{"score": 1}], "model": "", "info": {}}'])
def test_foreign_json(text):
    with pytest.raises(ConfigError, match=r"results\.json"):
        from_json(text)


def test_no_results(tmp_path):
    with pytest.raises(ConfigError, match="finished"):
        load_result(tmp_path)
