"""Every piece of `make gpu` runs here at tiny sizes, leaves its record, is not run twice, and says what it lacks."""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import kept, machine, runner, setting, speed, tiles, training
from bench.gpu.pieces import PIECES
from bench.gpu.recipes import configured, dotted
from bench.gpu.setting import Piece, Setting
from rcmstr_fast.config import ConfigError
from tests.train.real import write_words

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="dry runs are for machines without a GPU")
#: Heavy ones, whose code the others or tests of their own run too.
ELSEWHERE = {
    "once", "conv-tiles", "tests-ops", "tests-train", "loss-tiles", "data", "methods", "step-vit", "racecheck", "large-cnn",
    "large-vit", "small-cnn", "compile-cnn", "compile-vit", "compile-max-cnn", "compile-max-vit", "real",
}  # fmt: skip


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "words.txt").write_text("\n".join(f"{a}{b}{c}" for a in "abcd" for b in "xyz" for c in "1234"))
    return Setting(folder / "out", "cpu", dry=True, work=folder / "work", words=str(folder / "words.txt"), limit=400)


@pytest.fixture(autouse=True)
def one_state_of_the_sources(monkeypatch, request):
    kept.describe.cache_clear()
    if "sources" not in request.node.name:
        monkeypatch.setattr(setting, "digest", lambda: "0123456789ab")


ALIKE = ("learning", "operations-")  # one of each is enough
SHORT = [name for name in PIECES if name not in ELSEWHERE and not name.startswith(ALIKE)] + ["operations-small"]


@pytest.mark.parametrize("name", SHORT)
def test_dry_run(dry, name):
    if name == "build":
        pytest.importorskip("pybind11", reason="pybind11 is not installed")
    assert runner.inside(PIECES[name], dry) == 0
    record = json.loads(kept.done(PIECES[name], dry).read_text())
    rows = [row for row in record["rows"] if row["piece"] == name]
    assert rows and record["pieces"][name]["sources"] == "0123456789ab" and record["machine_info"]["version"]
    statuses = {row["status"] for row in rows}
    assert statuses <= ({"ok", "not run"} if name == "memory" else {"ok"})


def test_the_cnn_steps_dense_and_sparse(dry):
    rows = speed.steps(dry, "resnet29", [], (4,), masked=speed.MASKED)
    assert [row["masked"] for row in rows] == ["dense", "sparse"] and "RCMSTR_FAST_MASKED_STAGES" not in os.environ


def test_tiles_of_the_masked_convolution_are_tried(dry):
    rows = tiles.convolutions(dry)
    assert {(row["way"], row["pass"]) for row in rows if row["what"] == "masked convolution"} == {
        ("lists", "sites"),
        ("cuDNN", "forward"),
        ("cuDNN", "data"),
        ("cuDNN", "weight"),
    }
    tried = [row for row in rows if row["what"] == "conv tile"]
    assert [(row["pass"], row["shipped"]) for row in tried] == [
        (kind, shipped) for kind in ("forward", "weight", "both") for shipped in (True, False)
    ]
    assert all(row["status"] == "ok" and row["ms"] > 0 for row in tried), tried


def test_a_wrong_tile_is_not_timed():
    expected = torch.ones(3)
    assert tiles.tried(lambda: 2 * expected, expected, torch.device("cpu"), 1, graph=False)["status"] == "FAIL"
    assert tiles.tried(lambda: expected / 0 + [], expected, torch.device("cpu"), 1, graph=False)["status"] != "ok"


def test_learning_from_rendering_to_the_test_words(dry, tmp_path):
    pytest.importorskip("fontTools", reason="fontTools is not installed")
    test = write_words(tmp_path / "real-words", 8)
    chosen = dataclasses.replace(dry, test=str(test), seed=3, changes=("optim.lr=0.001",))
    rows = PIECES["learning-ere"].run(chosen)
    assert rows[0]["steps"] == 2 and rows[0]["changes"] == ["optim.lr=0.001"] and rows[0]["metrics"]
    tested = [(row["decoder"], row["set"], row["seed"]) for row in rows[1:]]
    assert tested == [("ctc", "real-words", 3), ("attention", "real-words", 3)]
    assert all(0 <= row["accuracy"] <= 1 and row["count"] == 8 for row in rows[1:])
    assert kept.key_of(PIECES["learning-ere"], chosen) == "learning-ere-s3"


def test_a_real_run_is_stopped_and_goes_on(dry):
    pytest.importorskip("fontTools", reason="fontTools is not installed")
    rendered, first, resumed = training.real_run(dry)
    assert rendered["words"] == 16 and first["status"] == resumed["status"] == "ok", (first, resumed)
    assert first["exit"] == 143 and 0 == first["from_step"] < first["to_step"] <= resumed["from_step"]
    assert resumed["metrics"][0]["step"] == resumed["from_step"] + 1
    assert any("images" in name for name in resumed)


def test_a_piece_that_is_done_is_left_out_and_a_stopped_one_is_not(tmp_path, capsys, monkeypatch):
    calls = []
    piece = Piece("short", "machine", "a test", lambda s: calls.append(1) or [{"what": "x"}])
    chosen = Setting(tmp_path, "cpu", dry=True, work=tmp_path / "work")
    monkeypatch.setattr(runner, "subprocess", None)  # nothing is started
    assert runner.inside(piece, chosen) == 0 and runner.run(piece, chosen, False) == 0
    assert "short: done" in capsys.readouterr().out
    broken = Piece("broken", "machine", "a test", lambda s: (s.keep([{"what": "first"}]), 1 / 0))
    assert runner.inside(broken, chosen) == 1 and kept.done(broken, chosen) is None
    first, stopped = kept.rows_of(broken, chosen)
    assert first["what"] == "first" and stopped["status"] == "stopped" and "ZeroDivisionError" in stopped["reason"]
    assert calls == [1] and kept.done(piece, chosen), "one file holds both"


def test_a_piece_without_rows_is_not_finished(tmp_path):
    chosen = Setting(tmp_path, "cpu", dry=True, work=tmp_path / "work")
    piece = Piece("empty", "machine", "a test", lambda s: [])
    assert runner.inside(piece, chosen) == 1 and kept.done(piece, chosen) is None
    assert kept.rows_of(piece, chosen)[0]["reason"] == "it measured nothing"


def test_records_in_the_checkout_count_and_go_along(tmp_path, monkeypatch):
    monkeypatch.setattr(setting, "RESULTS", tmp_path / "results")
    old, new = (Piece(name, "steps", "a test", lambda s: [{"what": "x"}]) for name in ("old", "new"))
    assert runner.inside(old, Setting(tmp_path / "results", "cpu", work=tmp_path)) == 0
    fresh = Setting(tmp_path / "out", "cpu", work=tmp_path)
    assert kept.done(old, fresh) and kept.done(new, fresh) is None
    assert runner.inside(new, fresh) == 0
    (path,) = (tmp_path / "out").rglob("*.json")
    assert {row["piece"] for row in json.loads(path.read_text())["rows"]} == {"old", "new"}


def test_few_files_travel():
    assert len({piece.family for piece in PIECES.values()}) <= 8


def test_the_first_half_hour_measures_before_it_tests():
    names = list(PIECES)
    first = ["build", "once", "conv-tiles", "steady", "step-cnn", "parts", "memcheck"]
    assert names[: len(first)] == first and names.index("tests-ops") > names.index("operations-terms")


def test_a_timeout_ends_the_children_too(tmp_path):
    child = "import time, pathlib, sys, os; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])"
    chosen = Setting(tmp_path, "cpu", work=tmp_path, limit=8.0)
    noted = tmp_path / "pid"
    assert runner.limited([sys.executable, "-c", parent, child, str(noted)], chosen) is None
    pid = int(noted.read_text())
    for _ in range(100):
        if not alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the grandchild lives on")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_piece_that_takes_too_long_is_stopped_and_said(tmp_path, capsys):
    chosen = Setting(tmp_path, "cpu", dry=True, work=tmp_path / "work", limit=0.05)
    assert runner.run(PIECES["ceilings"], chosen, False) == 1
    said = capsys.readouterr().out
    assert "stopped after 0 s" in said and "finished" not in said and kept.done(PIECES["ceilings"], chosen) is None


def test_a_stopped_piece_keeps_what_it_has_measured(tmp_path, monkeypatch):
    chosen = Setting(tmp_path, "cpu", dry=True, work=tmp_path / "work")
    piece = PIECES["operations-small"]

    def killed(words, setting):
        speed.operations(
            dataclasses.replace(setting, keep=lambda rows: runner._keep(piece, setting, rows)), ["enqueue_"]
        )

    monkeypatch.setattr(runner, "limited", killed)
    for _ in range(2):  # what an earlier try has left does not count
        assert runner.run(piece, chosen, False) == 1
    rows = kept.rows_of(piece, chosen)
    assert {row["provider"] for row in rows[:-1]} == {"eager", "ours"} and len(rows) == 5
    assert rows[-1]["status"] == "stopped" and kept.done(piece, chosen) is None


def test_what_is_missing_is_one_line(tmp_path, capsys):
    piece = Piece("odd", "machine", "a test", lambda s: [], ("no_such_package",), ("no-such-program",))
    assert piece.missing() == ["Python package no_such_package", "program no-such-program"]
    assert runner.run(piece, Setting(tmp_path, "cpu"), False) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert command.main(["--list", "--out", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PIECES) and "no CUDA GPU" in listed
    assert command.main(["nothing"]) == 2 and "unknown piece nothing" in capsys.readouterr().err


def test_without_a_gpu_the_status_says_so(tmp_path, capsys):
    assert command.main(["ceilings", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "bench.gpu: expected a CUDA GPU, torch finds none; --dry runs tiny sizes here\n"
    assert not list(tmp_path.iterdir())


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
    monkeypatch.setattr(runner, "inside", lambda piece, made: seen.append((piece.name, made)) or 0)
    assert command.main(["memory", "--inside", *runner.words(chosen)]) == 0
    assert seen == [("memory", chosen)]


def test_configurations_from_dotted_fields():
    config = configured({"model.encoder": "vit_tiny"}, ("method.inter_weight=0.5", "optim.name=sgd"))
    assert (config.model.encoder, config.method.inter_weight, config.optim.name) == ("vit_tiny", 0.5, "sgd")
    with pytest.raises(ConfigError, match=r"unknown field model\.encodr"):
        configured({"model.encodr": "vit_tiny"})
    with pytest.raises(ConfigError, match=r"unknown field optimiser\.lr"):
        configured({}, ("optimiser.lr=1",))
    assert dotted({"seed": 1, "model": {"encoder": "x"}}) == {"seed": 1, "model.encoder": "x"}


def test_largest_batches_follow_the_line():
    rows = [{"batch": b, "status": "ok", "reserved_gib": 2 + b / 32} for b in (128, 256, 512)]
    fit = speed.largest_batches(rows)
    assert fit["gib_at_0"] == pytest.approx(2) and fit["gib_an_image"] == pytest.approx(1 / 32)
    assert fit["largest_batch"]["12"] == (0.94 * 12 - 2) * 32 // 8 * 8 and speed.largest_batches([])["reason"]


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
