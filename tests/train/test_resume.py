import os
import signal
import time

import pytest

from rcmstr_fast.config import ConfigError, RunError
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.runfolder import RunFolder
from tests.train.compare import assert_same_run, metrics
from tests.train.launch import kill_at_random_moments, start
from tests.train.toy import toy_run

TOY = "tests.train.toy"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of 12 steps."""
    return toy_run(tmp_path_factory.mktemp("whole") / "run")


def test_run_folder_is_complete(whole):
    folder = RunFolder(whole)
    for path in (folder.config, folder.metrics, folder.text, folder.pictures, folder.last, folder.best, folder.encoder):
        assert path.stat().st_size > 0, path
    assert (whole / "environment.json").exists() and list(folder.tensorboard.iterdir())
    assert [line["step"] for line in metrics(whole)] == [2, 4, 6, 8, 10, 12]
    line = metrics(whole)[-1]
    assert line["samples"] == 96 and line["epoch"] == 12 / 5 and line["nonfinite"] == 0
    assert {"loss", "loss_info", "grad_norm", "lr", "accuracy_word"} <= line.keys()


@pytest.mark.parametrize("step", [3, 5, 6, 10])
def test_stopped_by_a_signal_and_continued_is_bit_exact(tmp_path, whole, step):
    def stop(at):
        if at == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(RunError, match=f"stopped by SIGTERM, saved at step {step + 1}") as error:
        toy_run(tmp_path / "run", on_step=stop)
    assert error.value.status == 128 + signal.SIGTERM
    toy_run(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_longer_run_continues_and_finished_run_stays(tmp_path, whole, caplog):
    run = tmp_path / "run"
    toy_run(run, optim__schedule="constant", train__steps=7, optim__warmup_steps=1)
    before = RunFolder(run).last.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        toy_run(run, optim__schedule="constant", train__steps=7, optim__warmup_steps=1)
    assert "finished at step 7" in caplog.text and RunFolder(run).last.stat().st_mtime_ns == before
    toy_run(run, optim__schedule="constant", train__steps=12, optim__warmup_steps=1)
    other = toy_run(tmp_path / "other", optim__schedule="constant", optim__warmup_steps=1)
    assert [x for x in metrics(run) if x["step"] != 7][-1] == metrics(other)[-1]


def test_killed_between_steps_continues_bit_exact(tmp_path, whole):
    for step in (0, 7):
        assert start(TOY, str(tmp_path / "run"), f"kill={step}").wait()[0] == -signal.SIGKILL
    assert start(TOY, str(tmp_path / "run")).wait()[0] == 0
    assert_same_run(tmp_path / "run", whole)


def test_killed_at_ten_random_moments_continues_bit_exact(tmp_path):
    fields = {"train__steps": 60, "train__save_every": 1}
    toy_run(tmp_path / "whole", **fields)
    words = [f"{name}={value}" for name, value in fields.items()]
    assert len(kill_at_random_moments(TOY, tmp_path / "run", "sleep=0.02", *words, within=0.2)) > 3
    assert start(TOY, str(tmp_path / "run"), *words).wait()[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_damaged_last_checkpoint_gives_way_to_the_previous(tmp_path, whole, damage):
    run = toy_run(tmp_path / "run", train__steps=11, optim__warmup_steps=1, train__save_every=5)
    last = RunFolder(run).last
    data = bytearray(last.read_bytes())
    if damage == "cut":
        last.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[data.index(b"PK\x03\x04", len(data) // 2) - 40] ^= 255
        last.write_bytes(data)
    else:
        last.unlink()
    toy_run(run, train__steps=12, optim__warmup_steps=1)
    log = RunFolder(run).text.read_text()
    assert "begins at step 10" in log and ("last.pt is" in log) == (damage != "missing")
    assert checkpoint.load(last)["step"] == 12


def test_no_whole_checkpoint_is_an_error(tmp_path):
    run = toy_run(tmp_path / "run")
    folder = RunFolder(run)
    for path in (folder.last, folder.checkpoints / "previous.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"no whole checkpoint: last.pt is .*; previous.pt is"):
        toy_run(run, train__steps=20)


def test_changed_data_are_refused(tmp_path):
    run = toy_run(tmp_path / "run", train__steps=5)
    with pytest.raises(ConfigError, match="began with 40 images an epoch, now there are 48"):
        toy_run(run, images=48, train__steps=6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_end_a_process_in_good_order(tmp_path, number):
    process = start(TOY, str(tmp_path / "run"), "sleep=0.05", "train__steps=2000")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.process.is_alive(), process.wait()
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(process.process.pid, number)
    status, stderr = process.wait()
    assert status == 128 + number, stderr
    assert f"stopped by {signal.Signals(number).name}, saved at step" in stderr
    state = checkpoint.load(RunFolder(tmp_path / "run").last)
    assert f"saved at step {state['step']};" in stderr


def test_saves_by_the_clock_change_nothing(tmp_path, whole):
    run = toy_run(tmp_path / "run", train__save_minutes=1e-9)
    assert RunFolder(run).text.read_text().count("saved ") == 12
    assert_same_run(run, whole)
    assert best(run) == best(whole)


def best(run) -> tuple:
    state = checkpoint.load(RunFolder(run).best)
    return state["step"], state["loss"]
