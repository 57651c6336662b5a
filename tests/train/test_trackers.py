"""Trackers take the finite values of every step, and a failing one never stops a run."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.methods import settings
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.log import RunLog
from rcmstr_fast.train.loop import pretrain
from rcmstr_fast.train.runfolder import RunFolder, differences
from rcmstr_fast.train.trackers import Trackers, check_trackers, finite, open_trackers


class Recorder:
    def __init__(self, fail_at=None):
        self.seen, self.closed, self.fail_at = [], False, fail_at

    def log(self, step, values):
        if step == self.fail_at:
            raise ConnectionError("no network")
        self.seen.append((step, finite(values)))

    def close(self):
        self.closed = True


def test_a_failing_tracker_is_left_out(caplog):
    good, bad, trackers = Recorder(), Recorder(fail_at=2), Trackers()
    trackers.add("good", lambda: good)
    trackers.add("bad", lambda: bad)
    trackers.add("absent", lambda: 1 / 0)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            trackers.log(step, {"step": step, "loss": step / 2, "accuracy": None, "seconds": 9.0})
    trackers.close()
    assert good.seen == [(1, {"loss": 0.5}), (2, {"loss": 1.0}), (3, {"loss": 1.5})] and good.closed
    assert [step for step, _ in bad.seen] == [1] and not bad.closed
    assert [record.args[0] for record in caplog.records] == ["absent", "bad"]


def fake_wandb(calls):
    def init(**given):
        calls.append(("init", given))
        return SimpleNamespace(
            log=lambda values, step: calls.append(("log", step, values)), finish=lambda: calls.append(("finish",))
        )

    return SimpleNamespace(init=init, util=SimpleNamespace(generate_id=lambda: f"id{len(calls)}"))


def fake_mlflow(calls):
    def start_run(run_id, run_name):
        calls.append(("init", run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "new"))

    return SimpleNamespace(
        start_run=start_run,
        log_params=lambda values: calls.append(("params", values)),
        log_metrics=lambda values, step: calls.append(("log", step, values)),
        end_run=lambda: calls.append(("finish",)),
    )


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_continued_run_is_the_same_run(tmp_path, monkeypatch, name):
    calls: list = []
    monkeypatch.setitem(sys.modules, name, {"wandb": fake_wandb, "mlflow": fake_mlflow}[name](calls))
    for step in (0, 5):
        trackers = open_trackers(["tensorboard", name], tmp_path, {"train": {"steps": 9}}, step, tmp_path / "events")
        trackers.log(step + 1, {"loss": 0.5, "step": step + 1})
        trackers.close()
    assert [call for call in calls if call[0] == "log"] == [("log", 1, {"loss": 0.5}), ("log", 6, {"loss": 0.5})]
    assert sum(call[0] == "finish" for call in calls) == 2
    begun = [call for call in calls if call[0] == "init"]
    if name == "wandb":
        assert begun[0][1]["id"] == begun[1][1]["id"] and begun[0][1]["config"] == {"train": {"steps": 9}}
    else:
        assert [call[1] for call in begun] == [None, "new"] and ("params", {"train.steps": "9"}) in calls
    assert list((tmp_path / "events").glob("events.*"))


def test_a_tracker_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed; pip install"):
        check_trackers(["wandb"])
    with pytest.raises(ConfigError, match="expected some of tensorboard, wandb, mlflow"):
        check_trackers(["wundb"])
    check_trackers([])


def test_a_run_hands_its_lines_to_the_trackers_and_outlives_them(tmp_path, monkeypatch):
    calls: list = []
    wandb = fake_wandb(calls)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(start_run=lambda **_: 1 / 0))
    folder = RunFolder(tmp_path)
    log = RunLog(folder, World(torch.device("cpu")))
    log.begin(0, 2, ["wandb", "mlflow"], {"seed": 3})
    log.write({"step": 1, "loss": 0.5})
    log.write({"step": 2, "loss": 0.25})
    log.close()
    assert calls[0][1]["config"] == {"seed": 3} and calls[-1] == ("finish",)
    assert calls[1:-1] == [("log", 1, {"loss": 0.5}), ("log", 2, {"loss": 0.25})]
    assert "mlflow cannot be written (division by zero)" in folder.text.read_text()
    assert not folder.tensorboard.exists() and len(folder.metrics.read_text().splitlines()) == 2


def test_a_missing_tracker_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = PretrainConfig(run=str(tmp_path / "run"), method=settings("seqmoco"))
    config.train.trackers = ["wandb"]
    with pytest.raises(ConfigError, match="wandb is not installed"):
        pretrain(config)
    assert not (tmp_path / "run").exists()
    assert not differences({"train": {"trackers": ["tensorboard"]}}, {"train": {"trackers": ["wandb"]}})
