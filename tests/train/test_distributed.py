import pytest
import torch

from rcmstr_fast.config import ConfigError
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.distributed import World, choose_device, joined
from rcmstr_fast.train.runfolder import RunFolder
from tests.train.compare import assert_same_run, last, metrics
from tests.train.launch import Started, launch
from tests.train.toy import toy_run


def assert_close_runs(one, other, tolerance, but=()):
    """Metrics and tensors of two divisions of the same batches, `but` those with such words in their names."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not any(word in name for word in but):
                assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)
    a, b = last(one), last(other)
    for name in a:
        if name.startswith(".method") and not any(word in name for word in but):
            torch.testing.assert_close(a[name].float(), b[name].float(), rtol=tolerance, atol=tolerance, msg=name)


def test_two_processes_equal_one(tmp_path):
    done = launch("tests.train.toy", str(tmp_path / "two"), "method__bn_group_size=2")
    assert [status for status, _ in done] == [0, 0], done
    one = toy_run(tmp_path / "one", method__bn_group_size=2)
    assert_close_runs(one, tmp_path / "two", 1e-5)
    assert checkpoint.load(RunFolder(tmp_path / "two").last)["world_size"] == 2


def test_run_of_two_processes_is_continued_by_one(tmp_path):
    done = launch("tests.train.toy", str(tmp_path / "run"), "method__bn_group_size=2", "train__steps=7")
    assert [status for status, _ in done] == [0, 0], done
    toy_run(tmp_path / "run", method__bn_group_size=2)
    assert metrics(tmp_path / "run")[-1]["step"] == 12


def test_two_processes_are_continued_bit_exact(tmp_path):
    """Batch norm's running statistics are each process's own; saves by the clock of rank 0 change nothing."""
    whole = launch("tests.train.toy", str(tmp_path / "whole"))
    part = launch("tests.train.toy", str(tmp_path / "run"), "rank=1", "term=6", "train__save_minutes=1e-9")
    rest = launch("tests.train.toy", str(tmp_path / "run"))
    assert [status for status, _ in whole + part + rest] == [0, 0, 143, 143, 0, 0], part
    assert RunFolder(tmp_path / "run").text.read_text().count("saved ") == 7 + 2
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_accumulation_equals_the_whole_batch(tmp_path):
    whole = toy_run(tmp_path / "whole", method__bn_group_size=2)
    parts = toy_run(tmp_path / "parts", method__bn_group_size=2, train__accumulate=4)
    assert_close_runs(whole, parts, 1e-5)


def test_batch_norm_statistics_are_averaged_at_checkpoints(tmp_path):
    done = launch("tests.train.toy", str(tmp_path / "two"), "train__steps=1")
    assert [status for status, _ in done] == [0, 0], done
    one = last(toy_run(tmp_path / "one", train__steps=1))[".method.online_encoder.1.running_mean"]
    two = last(tmp_path / "two")[".method.online_encoder.1.running_mean"]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_non_finite_step_names_the_process(tmp_path):
    done = launch("tests.train.toy", str(tmp_path / "run"), "poison=2,3,4")
    assert all(status for status, _ in done)
    assert all("step 3: not finite: loss, loss_info on rank 1; stopped after 3" in error for _, error in done)


def test_error_on_one_process_ends_all(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("x")
    done = launch("tests.train.toy", str(tmp_path / "run"))
    assert all(status for status, _ in done) and all("is not empty and not a run" in error for _, error in done)


def test_lost_process_ends_the_others(tmp_path):
    done = launch("tests.train.toy", str(tmp_path / "run"), "rank=1", "kill=4")
    assert done[1][0] == -9 and done[0][0], done
    assert "another process of the run is gone" in done[0][1]


def test_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    done = launch("tests.train.toy", str(tmp_path / "run"), "rank=1", "term=4", "train__steps=200")
    assert [status for status, _ in done] == [143, 143], done
    assert all("saved at step 5" in error for _, error in done)


def test_single_process_collectives_are_the_identity():
    world = World(torch.device("cpu"))
    x = torch.arange(3.0)
    assert torch.equal(world.gather(x), x) and torch.equal(world.mean(x), x)
    assert world.on_rank0(lambda: 5) == 5


@pytest.mark.parametrize(
    ("how", "words"),
    [("freeze", "gives no sign of life: frozen"), ("sleep", "is alive, but has not come to exchange 5")],
)
def test_a_silent_process_is_named(how, words):
    done = launch("tests.train.exchange", how, "0.05", processes=3, survives=False)
    assert [status for status, _ in done] == [2, 2, -9], done
    told = [text for _, text in done[:2] if "waited 0.05 minutes (train.timeout_minutes)" in text]
    assert told and all("rank 2 (process " in text and words in text and "rank 1" not in text for text in told), done


def test_a_process_that_never_comes_is_one_line():
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    status, text = Started("tests.train.exchange", ["", "0.02"], environment).wait()
    assert status == 2 and "rank 1 cannot meet the other processes at 127.0.0.1:1 (" in text


GIVEN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a whole number in 1..1048576, got 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number in 1.."),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE must be a whole number in 1.."),
        ({"RANK": "2"}, r"RANK must be a whole number in 0..1, got '2'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a whole number in 0..1, got '-1'"),
        ({"MASTER_ADDR": None}, "need a place to meet; the environment lacks MASTER_ADDR"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "lacks MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a whole number in 1..65535, got 'http'"),
    ],
)
def test_a_wrong_environment_is_one_line(monkeypatch, change, words):
    for name, value in (GIVEN | change).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words), joined("cpu"):
        pass


def test_environment_and_device_errors(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="the environment has only RANK"), joined("cpu"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        choose_device("cuda", 0)
    assert choose_device("auto", 0) == torch.device("cpu")
