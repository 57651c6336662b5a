"""One format for records: what is written is read back, whoever wrote it, and what is none is one line."""

import json

import pytest

from rcmstr_fast.config import ConfigError
from rcmstr_fast.measure import machine, records
from rcmstr_fast.train import utilisation


def test_rows_come_back_and_the_machine_goes_along(tmp_path):
    made = records.record([{"provider": "ours", "ms": 1.0}], about={"commit": "abc+", "gpus": []}, seconds=3)
    path = records.write(tmp_path, "step", made)
    assert path == tmp_path / "cpu" / "step.json" and not list(tmp_path.rglob("*.half"))
    found = records.read(path)
    assert records.rows_of(found) == [{"provider": "ours", "ms": 1.0}] and found["seconds"] == 3
    assert found["commit_info"] == {"id": "abc", "dirty": True} and found["benchmarks"] == []


def test_entries_of_pytest_benchmark_are_rows():
    stats = {"median": 0.002, "min": 0.001, "q1": 0.001, "q3": 0.003, "rounds": 3}
    entry = {"group": "g", "name": "n", "extra_info": {"provider": "ours"}, "stats": stats}
    (row,) = records.rows_of({"benchmarks": [entry]})
    assert row == {
        "group": "g",
        "name": "n",
        "status": "ok",
        "rounds": 3,
        "ms": 2.0,
        "ms_25": 1.0,
        "ms_75": 3.0,
        "best_ms": 1.0,
        "provider": "ours",
    }
    stats["data"] = [0.001, 0.002, 0.002, 0.005]
    assert records.rows_of({"benchmarks": [entry]})[0]["ms_25"] == pytest.approx(1.75)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmarks": [{"name": "n"}]}', "null"])
def test_what_is_no_record_is_one_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigError, match=r"expected a record of measurements, got .*x\.json"):
        records.read(tmp_path / "x.json")


def test_machines_have_names_for_folders():
    assert machine.name_of({"gpus": [{"name": "NVIDIA H200"}]}) == "nvidia-h200" and machine.name_of({}) == "cpu"
    about = machine.describe()
    assert about["threads"] >= 1 and "backends" not in about and json.dumps(about)
    assert machine.commit_of({"commit": None}) == {"id": None, "dirty": False}


def test_known_gpus_have_one_table():
    assert utilisation.peak("NVIDIA H200 NVL").sheet == 989e12 and utilisation.peak("cpu, 2 threads") is None
