"""Every piece of `make gpu` runs here at tiny sizes, leaves its record, is not run twice, and says what it lacks."""

import dataclasses
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import benchmarks, machine, setting, training
from bench.gpu.pieces import PIECES
from bench.gpu.setting import Piece, Setting, done, pretrain_config
from rcmstr_fast.config import ConfigError
from tests.train.real import write_words

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="dry runs are for machines without a GPU")
#: Heavy ones, whose code the others or tests of their own run too.
ELSEWHERE = {
    "tests-ops", "tests-train", "sweep", "data", "methods", "step-vit", "racecheck", "large-cnn", "large-vit",
    "compile-cnn", "compile-vit", "compile-max-cnn", "compile-max-vit", "real",
}  # fmt: skip


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "words.txt").write_text("\n".join(f"{a}{b}{c}" for a in "abcd" for b in "xyz" for c in "1234"))
    return Setting(folder / "out", "cpu", dry=True, work=folder / "work", words=str(folder / "words.txt"), limit=400)


@pytest.fixture(autouse=True)
def one_state_of_the_sources(monkeypatch, request):
    if "sources" not in request.node.name:
        monkeypatch.setattr(setting, "digest", lambda: "0123456789ab")


ALIKE = ("learning", "operations-")  # one of each is enough
SHORT = [name for name in PIECES if name not in ELSEWHERE and not name.startswith(ALIKE)] + ["operations-small"]


@pytest.mark.parametrize("name", SHORT)
def test_dry_run(dry, name):
    if name == "build":
        pytest.importorskip("pybind11", reason="pybind11 is not installed")
    assert command.inside(PIECES[name], dry) == 0
    record = json.loads(done(PIECES[name], dry).read_text())
    assert record["rows"] and record["machine"]["sources"] == setting.digest() and record["version"]
    statuses = {row["status"] for row in record["rows"]}
    assert statuses <= ({"ok", "not run"} if name == "memory" else {"ok"})


def test_learning_from_rendering_to_the_test_words(dry, tmp_path):
    pytest.importorskip("fontTools", reason="fontTools is not installed")
    test = write_words(tmp_path / "real-words", 8)
    chosen = dataclasses.replace(dry, test=str(test), seed=3, changes=("optim.lr=0.001",))
    rows = PIECES["learning-ere"].run(chosen)
    assert rows[0]["steps"] == 2 and rows[0]["changes"] == ["optim.lr=0.001"] and rows[0]["metrics"]
    tested = [(row["decoder"], row["set"], row["seed"]) for row in rows[1:]]
    assert tested == [("ctc", "real-words", 3), ("attention", "real-words", 3)]
    assert all(0 <= row["accuracy"] <= 1 and row["count"] == 8 for row in rows[1:])
    assert setting.record_name(PIECES["learning-ere"], chosen) == "gpu-learning-ere-s3.json"


def test_a_real_run_is_stopped_and_goes_on(dry):
    pytest.importorskip("fontTools", reason="fontTools is not installed")
    rendered, first, resumed = training.real_run(dry)
    assert rendered["words"] == 16 and first["status"] == resumed["status"] == "ok", (first, resumed)
    assert first["exit"] == 143 and 0 == first["from_step"] < first["to_step"] <= resumed["from_step"]
    assert resumed["metrics"][0]["step"] == resumed["from_step"] + 1
    assert any("images" in name for name in resumed)


def test_a_piece_that_is_done_is_left_out_and_a_stopped_one_is_not(tmp_path, capsys, monkeypatch):
    calls = []
    piece = Piece("short", "a test", lambda s: calls.append(1) or [{"what": "x"}])
    chosen = Setting(tmp_path, "cpu", dry=True, work=tmp_path / "work")
    monkeypatch.setattr(command, "subprocess", None)  # nothing is started
    assert command.inside(piece, chosen) == 0 and command._run(piece, chosen, False) == 0
    assert "short: done" in capsys.readouterr().out
    broken = Piece("broken", "a test", lambda s: 1 / 0)
    assert command.inside(broken, chosen) == 1 and done(broken, chosen) is None
    rows = json.loads((tmp_path / "cpu" / "gpu-broken.json").read_text())["rows"]
    assert rows[0]["status"] == "stopped" and "ZeroDivisionError" in rows[0]["reason"] and calls == [1]


def test_a_piece_that_takes_too_long_is_stopped_and_said(tmp_path, capsys):
    chosen = Setting(tmp_path, "cpu", dry=True, work=tmp_path / "work", limit=0.05)
    assert command._run(PIECES["ceilings"], chosen, False) == 1
    assert "stopped after 0 s" in capsys.readouterr().out and done(PIECES["ceilings"], chosen) is None


def test_a_stopped_piece_keeps_what_it_has_measured(tmp_path, monkeypatch):
    chosen = Setting(tmp_path, "cpu", dry=True, work=tmp_path / "work")

    def run(words, **options):
        benchmarks.operations(chosen, ("enqueue_",))
        raise subprocess.TimeoutExpired(words, options["timeout"])

    monkeypatch.setattr(command, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired))
    for _ in range(2):  # what an earlier try has left does not count
        assert command._run(PIECES["operations-small"], chosen, False) == 1
    (path,) = tmp_path.glob("*/gpu-operations-small.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["provider"] for row in rows[:-1]} == {"eager", "ours"} and len(rows) == 5
    assert rows[-1]["status"] == "stopped" and done(PIECES["operations-small"], chosen) is None


def test_what_is_missing_is_one_line(tmp_path, capsys):
    piece = Piece("odd", "a test", lambda s: [], ("no_such_package",), ("no-such-program",))
    assert piece.missing() == ["Python package no_such_package", "program no-such-program"]
    assert command._run(piece, Setting(tmp_path, "cpu"), False) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert command.main(["--list", "--out", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PIECES) and "no CUDA GPU" in listed
    assert command.main(["nothing"]) == 2 and "unknown piece nothing" in capsys.readouterr().err


def test_the_command_line_of_a_piece_makes_the_same_setting(tmp_path, monkeypatch):
    chosen = Setting(
        tmp_path,
        "cpu",
        dry=True,
        work=tmp_path,
        seed=4,
        steps=7,
        changes=("a=1", "b=2"),
        tag="memory",
        commit="abc1234",
    )
    seen = []
    monkeypatch.setattr(command, "inside", lambda piece, made: seen.append((piece.name, made)) or 0)
    assert command.main(["memory", "--inside", *command._options(chosen)]) == 0
    assert seen == [("memory", chosen)]


def test_configurations_from_nested_values():
    config = pretrain_config({"model": {"encoder": "vit_tiny"}}, ("method.inter_weight=0.5", "optim.name=sgd"))
    assert (config.model.encoder, config.method.inter_weight, config.optim.name) == ("vit_tiny", 0.5, "sgd")
    with pytest.raises(ConfigError, match=r"unknown field model\.encodr"):
        pretrain_config({"model": {"encodr": "vit_tiny"}})


def test_largest_batches_follow_the_line():
    rows = [{"batch": b, "status": "ok", "reserved_gib": 2 + b / 32} for b in (128, 256, 512)]
    fit = benchmarks.largest_batches(rows)
    assert fit["gib_at_0"] == pytest.approx(2) and fit["gib_an_image"] == pytest.approx(1 / 32)
    assert fit["largest_batch"]["12"] == (0.94 * 12 - 2) * 32 // 8 * 8 and benchmarks.largest_batches([])["reason"]


def test_the_sources_have_one_name(tmp_path, monkeypatch):
    first = setting.digest()
    assert first == setting.digest() and len(first) == 12
    monkeypatch.setattr(setting, "SOURCES", ("bench",))
    assert setting.digest() != first


def test_failures_of_the_suite_are_rows(dry, monkeypatch, tmp_path):
    report = (
        '<testsuites><testsuite><testcase classname="tests.a" name="good"/><testcase classname="tests.a" name="bad">'
        '<failure message="assert 1 == 2&#10;more"/></testcase></testsuite></testsuites>'
    )

    class Done:
        returncode, stdout, stderr = 1, "1 failed, 1 passed", ""

    def run(words, **_):
        path = next(word.split("=", 1)[1] for word in words if word.startswith("--junitxml"))
        with open(path, "w") as file:
            file.write(report)
        return Done

    monkeypatch.setattr(machine.subprocess, "run", run)
    summary, bad = machine.tests(dry, ("tests",))
    assert summary["status"] == "failed" and summary["tests"] == 2
    assert bad["what"] == "tests.a::bad" and bad["text"].startswith("assert 1 == 2")
