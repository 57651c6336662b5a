"""Runs that check and tune themselves: faults are survived, choices are kept, told to the others and resumed."""

import json
import signal

import pytest
import torch

from rcmstr_fast.config import ConfigError
from rcmstr_fast.timer import Times
from rcmstr_fast.train import loop, tuned
from rcmstr_fast.train.plan import make_plan
from rcmstr_fast.tuning import choices, engine, record
from tests.train.compare import assert_same_run, metrics
from tests.train.launch import Started, launch
from tests.train.toy import toy_config, toy_run
from tests.tuning.faults import FAULTS, planted

TOY = "tests.train.toy"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_record(tmp_path, monkeypatch):
    monkeypatch.setenv("RCMSTR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # orders the threads, on which rounding depends
    monkeypatch.delenv("RCMSTR_FAST_BACKEND", raising=False)
    monkeypatch.setattr(record, "_told", set())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are started here: sums of two threads are rounded differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run of 12 steps on the reference alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RCMSTR_FAST_BACKEND", "reference")
        return toy_run(tmp_path_factory.mktemp("reference") / "run")


def tuned_of(run, session=-1):
    return json.loads((run / "environment.json").read_text())["sessions"][session]["tuned"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_with_a_faulty_kernel_has_the_curve_of_the_reference(tmp_path, monkeypatch, caplog, reference, fault):
    planted(monkeypatch, fault)
    run = toy_run(tmp_path / "run")
    assert_same_run(run, reference)
    assert list(tuned_of(run)["refused"]) == ["grouped_batch_norm"]
    lines = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "refused" in r.getMessage()]
    assert len(lines) == 1 and FAULTS[fault][1] in lines[0]


def test_a_kernel_that_is_right_and_slow_loses_its_place(tmp_path, monkeypatch, reference):
    asked = planted(monkeypatch, "slow")

    def measure(run, device, *, rounds, warm_up):
        before = len(asked)
        run()
        return Times((1.0 + 20 * (len(asked) > before),))

    monkeypatch.setattr(engine, "measure", measure)
    run = toy_run(tmp_path / "run", train__tune="on")
    found = tuned_of(run)
    assert found["refused"] == {} and found["choices"]["backend.grouped_batch_norm"] == "reference"
    assert_same_run(run, reference)


def test_a_tuned_run_keeps_the_curve_and_the_next_one_reads_the_record(tmp_path, monkeypatch, caplog, reference):
    with caplog.at_level("INFO"):
        one = toy_run(tmp_path / "one", train__tune="on")
    assert tuned_of(one)["source"] == "measured now" and "tuned in" in caplog.text and "agree with" in caplog.text
    losses = [[line["loss"] for line in metrics(run)] for run in (one, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def fail(*args, **kwargs):
        raise AssertionError("nothing may be timed again")

    monkeypatch.setattr(engine, "contest", fail)
    two = toy_run(tmp_path / "two", train__tune="on")
    assert tuned_of(two)["source"] == "the record" and tuned_of(two)["choices"] == tuned_of(one)["choices"]
    assert_same_run(one, two)


def test_a_resumed_run_keeps_its_choices(tmp_path):
    run, fields = tmp_path / "run", {"optim__schedule": "constant", "optim__warmup_steps": 1}
    toy_run(run, train__steps=7, train__tune="on", **fields)
    path = run / "environment.json"
    held = json.loads(path.read_text())
    held["sessions"][0]["tuned"]["choices"] = kept = {"data.workers": 3, "backend.grouped_batch_norm": "reference"}
    path.write_text(json.dumps(held))
    toy_run(run, train__steps=12, train__tune="on", **fields)
    assert tuned_of(run)["choices"] == kept and "so far" in tuned_of(run)["source"]
    for session in held["sessions"]:
        del session["tuned"]  # an older version
    path.write_text(json.dumps(held))
    toy_run(run, train__steps=14, train__tune="on", **fields)
    assert tuned_of(run)["choices"] == {}


def test_out_of_memory_while_tuning_is_one_line(tmp_path, monkeypatch, caplog, reference):
    monkeypatch.setenv("RCMSTR_FAST_BACKEND", "reference")

    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(loop, "trial_of", full)
    run = toy_run(tmp_path / "run", train__tune="on")
    assert_same_run(run, reference)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "nothing is tuned, priors are taken: out of memory"
    ]


def environment(tmp_path):
    return {"RCMSTR_FAST_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "RCMSTR_FAST_BACKEND": "reference"}


def test_tuning_that_is_killed_leaves_nothing_half_done(tmp_path, reference):
    words = [str(tmp_path / "run"), 'train__tune="on"']
    assert Started(TOY, [*words, "kill=1"], environment(tmp_path)).wait()[0] == -signal.SIGKILL
    assert not (tmp_path / "run" / "environment.json").exists()
    status, text = Started(TOY, words, environment(tmp_path)).wait()
    assert status == 0, text
    assert tuned_of(tmp_path / "run")["source"] == "measured now"
    assert_same_run(tmp_path / "run", reference)


def test_two_runs_that_tune_at_once_and_two_processes_of_one(tmp_path, reference):
    started = [Started(TOY, [str(tmp_path / n), 'train__tune="on"'], environment(tmp_path)) for n in ("a", "b")]
    assert [process.wait()[0] for process in started] == [0, 0]
    for name in ("a", "b"):
        assert_same_run(tmp_path / name, reference)
    held = json.loads((tmp_path / "cache" / "tuning.json").read_text())
    (machine,) = held["machines"].values()
    assert all(found["done"] for found in machine["runs"].values())


def test_the_processes_of_a_run_compute_with_the_choices_of_the_first(tmp_path):
    words = [str(tmp_path / "run"), 'train__tune="on"', "train__steps=4"]
    done = launch(TOY, *words)
    assert [status for status, _ in done] == [0, 0], done
    assert "data.workers" in tuned_of(tmp_path / "run")["choices"]
    assert sum("tuned in" in text for _, text in done) <= 1


def test_the_cache_of_another_machine_is_ignored(tmp_path, monkeypatch, reference, caplog):
    other = record.machine(CPU) | {"device": "another"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "machine", lambda device: other)
        record.update(CPU, lambda mine: mine["checks"].update({"grouped_batch_norm/cpp": {"reasons": ["theirs"]}}))
    planted(monkeypatch, "slow")
    with caplog.at_level("INFO"):
        run = toy_run(tmp_path / "run")
    assert tuned_of(run)["refused"] == {} and caplog.text.count("another machine or version") == 1


def test_when_a_run_is_tuned(tmp_path, monkeypatch):
    def wanted(steps, tune="auto"):
        config = toy_config(tmp_path, train__steps=steps, train__tune=tune)
        return tuned.wanted(config, make_plan(config, 4000, 1))

    monkeypatch.delenv("RCMSTR_FAST_TUNE")
    assert [wanted(steps) for steps in (999, 1000)] == [False, True]
    assert wanted(2, "on") and not wanted(2000, "off")
    monkeypatch.setenv("RCMSTR_FAST_TUNE", "off")
    assert not wanted(2000) and wanted(2000, "on")
    monkeypatch.setenv("RCMSTR_FAST_TUNE", "maybe")
    with pytest.raises(ConfigError, match="must be on or off, got 'maybe'"):
        wanted(1000)


def test_nothing_holds_after_a_run(tmp_path):
    toy_run(tmp_path / "run", train__tune="on", train__steps=2)
    assert choices.current() == {}
