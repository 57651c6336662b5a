"""The runner: commands once, in order, after a kill only what is left; failures are named, not hidden."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import yaml

from rcmstr_fast.config import ConfigError
from rcmstr_fast.study import run as runner
from rcmstr_fast.study.page import runs_of, write_page
from rcmstr_fast.study.plan import cells, read_study
from rcmstr_fast.study.records import known_results, study_record
from rcmstr_fast.study.tables import UNFINISHED, cost_table, tables

#: Stands for `rcmstr`: writes what the real commands leave, and a line into `ran`.
COMMAND = """
import json, os, pathlib, sys, time
given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
run = pathlib.Path(given["run"]); run.mkdir(parents=True, exist_ok=True)
with open(run.parent.parent / "ran", "a") as file: file.write(str(run.name) + " " + sys.argv[1] + chr(10))
if "bad" in run.name and sys.argv[1] == "pretrain": sys.exit("it broke")
time.sleep(float(os.environ.get("PAUSE", 0)))
score = {"count": 4, "accuracy": 0.25 + 0.25 * int(given["seed"])}
results = {"sets": [{"set": "IIIT5K", "protocol": "exact", "total": 5, "score": score}]}
(run / "results.json").write_text(json.dumps(results))
(run / "metrics.jsonl").write_text(json.dumps({"step": 7, "samples": 70, "loss": 1.5}) + chr(10))
"""
STUDY = {
    "title": "Three rows",
    "table": "rcmstr_1",
    "encoder": "cnn",
    "seeds": [0, 1],
    "rows": [
        {"name": "SeqMoCo", "recipe": "r", "published": "seqmoco"},
        {"name": "bad", "recipe": "r", "seeds": [0], "set": {"flaw": 1}},
        {"name": "untrained", "encoder": "random", "seeds": [0]},
    ],
    "evaluations": [{"name": "CTC", "decoder": "ctc"}],
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RCMSTR", (sys.executable, "-c", COMMAND))
    monkeypatch.setattr(runner, "_LOOK", 0.01)
    (tmp_path / "r.yaml").write_text("seed: 0\n")
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return read_study(path)


def ran(folder):
    path = folder / "ran"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def test_runs_once_and_names_failures(study, tmp_path):
    out = tmp_path / "out"
    recipe = lambda name: tmp_path / f"{name}.yaml"  # noqa: E731
    outcome = runner.run_study(study, out, {}, recipe=recipe, jobs=2)
    assert outcome.failed == {"pretrain/bad-s0": "it broke"} and outcome.waiting == ["CTC/bad-s0"]
    assert len(outcome.done) == 5
    before = ran(out)
    again = runner.run_study(study, out, {}, recipe=recipe)
    assert ran(out) == [*before, "bad-s0 pretrain"] and again.failed == outcome.failed

    planned = cells(study, out, {}, recipe)
    record = study_record(study, out, planned)
    assert (record["commands"], record["done"]) == (7, 5) and len(record["processors"]) == 1
    (table,) = tables(record)
    assert table.head == ["row", "seeds", "IIIT5K (N 4/5)"]
    deviation = 100 * 0.25 / 2**0.5
    assert table.rows == [
        ["SeqMoCo", "2", f"37.50 ± {deviation:.2f}"],
        ["SeqMoCo, paper", "", "42.97"],
        ["bad", "0 of 1", UNFINISHED],
        ["untrained", "1", "25.00"],
    ]
    assert table.quoted == [False, True, False, False]
    cost = cost_table(record)
    assert cost is not None and cost.head[0] == "row" and len(cost.head) == len(cost.rows[0])
    assert all(any(row[i] for row in cost.rows) for i in range(len(cost.head))), "no empty column"
    files = write_page(record, runs_of(planned, out), tmp_path / "page.html")
    page, *texts = (path.read_text() for path in files)
    assert "37.50 ± 17.68" in page and "<svg" in page and 'src="http' not in page
    assert all("unfinished" in text for text in texts[:2]) and r"$\pm$" in texts[2]


def test_results_of_another_machine_are_not_made_again(study, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"

    def run(out, **more):
        planned = cells(study, out, {}, recipe)
        outcome = runner.run_study(study, out, {}, recipe=recipe, **more)
        return outcome, planned

    def recipe(name):
        return tmp_path / f"{name}.yaml"

    _, planned = run(there, only=["SeqMoCo"])
    (tmp_path / "record.json").write_text(json.dumps(study_record(study, there, planned)))
    planned = cells(study, here, {}, recipe)
    known = known_results(tmp_path / "record.json", planned)
    assert sorted(known) == ["CTC/SeqMoCo-s0", "CTC/SeqMoCo-s1", "pretrain/SeqMoCo-s0", "pretrain/SeqMoCo-s1"]
    run(here, known=list(known))
    assert sorted(ran(here)) == ["bad-s0 pretrain", "untrained-s0 probe"]
    record = study_record(study, here, planned, known)
    seqmoco, _, untrained = record["rows"]
    assert [r["sets"][0]["score"]["accuracy"] for r in seqmoco["results"]["CTC"].values()] == [0.25, 0.5]
    assert untrained["results"]["CTC"]["0"] and record["done"] == 5
    half = [*known][:3]  # one evaluation is missing: its pretraining is made here, the other's is not
    names = [cell.id for cell in runner.to_run(planned, [name for name in half if name.startswith("CTC/")])]
    assert {"pretrain/SeqMoCo-s0", "pretrain/SeqMoCo-s1"} - {*names} == {"pretrain/SeqMoCo-s0"}
    (tmp_path / "r.yaml").write_text("seed: 3\n")
    changed = cells(study, here, {}, recipe)
    assert not known_results(tmp_path / "record.json", changed)  # another recipe: nothing is known
    with pytest.raises(ConfigError, match="known must name a record that"):
        known_results(tmp_path / "r.yaml", planned)
    folder = tmp_path / "records"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"a folder with records \(.json\), .*records has none"):
        known_results(folder, planned)
    (tmp_path / "record.json").rename(folder / "record.json")
    assert sorted(known_results(folder, planned)) == sorted(known)


def test_half_a_record_is_not_known(study, tmp_path):
    def recipe(name):
        return tmp_path / f"{name}.yaml"

    there = tmp_path / "there"
    runner.run_study(study, there, {}, recipe=recipe, only=["untrained"])
    planned = cells(study, there, {}, recipe)
    record = study_record(study, there, planned)
    result = record["rows"][2]["results"]["CTC"]["0"]
    path = tmp_path / "record.json"

    def known(**changes):
        record["rows"][2]["results"]["CTC"]["0"] = {k: v for k, v in {**result, **changes}.items() if v is not None}
        path.write_text(json.dumps(record))
        return known_results(path, planned)

    assert list(known()) == ["CTC/untrained-s0"]
    assert not known(processor=None) and not known(commit=3) and not known(cpu_seconds=None) and not known(digest="0")
    assert not known(sets=None) and not known(sets=[3]) and not known(sets="4")
    with pytest.raises(ConfigError, match="known must name a record that"):
        known(digest=[])


def test_other_fields_are_refused(study, tmp_path):
    out = tmp_path / "out"
    runner.run_study(study, out, {}, recipe=lambda name: tmp_path / f"{name}.yaml")
    (tmp_path / "r.yaml").write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="pretrain/SeqMoCo-s0 has been done with other fields"):
        runner.run_study(study, out, {}, recipe=lambda name: tmp_path / f"{name}.yaml")


def test_unknown_row(study, tmp_path):
    with pytest.raises(
        ConfigError, match=r"only must name rows of the study .'SeqMoCo', 'bad', 'untrained'., got 'SeqMoko'"
    ):
        runner.run_study(study, tmp_path / "o", {}, recipe=lambda name: tmp_path / "r.yaml", only=["SeqMoko"])


def test_goes_on_after_kill(study, tmp_path):
    """kill -9 in the middle: what had ended well is not done again, what was under way is, and no command is left."""
    out = tmp_path / "out"
    driver = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from rcmstr_fast.study import run as runner
        from rcmstr_fast.study.plan import read_study
        runner.RCMSTR = (sys.executable, "-c", {COMMAND!r})
        runner._LOOK = 0.01
        recipe = lambda name: Path({str(tmp_path)!r}) / (name + ".yaml")
        runner.run_study(read_study(Path({str(tmp_path / "study.yaml")!r})), Path({str(out)!r}), {{}}, recipe=recipe)
    """)
    process = subprocess.Popen([sys.executable, "-c", driver], env=os.environ | {"PAUSE": "1"})
    deadline = time.monotonic() + 120
    while len(ran(out)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ran(out)[:2] == ["SeqMoCo-s0 pretrain", "SeqMoCo-s0 probe"]
    time.sleep(1.2)  # a command that had outlived the study would end well by now
    assert not (out / "CTC" / "SeqMoCo-s0" / "results.json").exists()
    runner.run_study(study, out, {}, recipe=lambda name: tmp_path / f"{name}.yaml")
    assert ran(out).count("SeqMoCo-s0 pretrain") == 1 and ran(out).count("SeqMoCo-s0 probe") == 2
    record = json.loads(runner.record_path(out, "CTC/SeqMoCo-s0").read_text())
    assert record["cpu_seconds"] >= 0 and record["arguments"][0] == "probe"
