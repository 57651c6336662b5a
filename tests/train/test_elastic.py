"""A run goes on with another number of processes, micro-batches or shards: the same samples, keys and losses."""

import signal

import pytest
import torch

from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.loop import pretrain
from rcmstr_fast.train.runfolder import RunFolder
from tests.train.compare import assert_same_run, metrics
from tests.train.launch import launch, start
from tests.train.real import WatchedStream, real_config, shown, write_words

REAL = "tests.train.real"
# Groups that no division cuts, and the same number of hidden pixels in every micro-batch; SGD as in test_real.py.
FIELDS = {
    "method__bn_group_size": 2,
    "method__num_blocks": 0,
    "optim__name": "sgd",
    "optim__lr": 5e-6,
    "train__steps": 6,
    "train__save_every": 1,
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """Six steps in one process, uninterrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return pretrain(real_config(run, words, **FIELDS), open_stream=WatchedStream)


def settings(**fields) -> list[str]:
    return [f"{name}={value}" for name, value in (FIELDS | fields).items()]


def leg(run, words, processes: int, **fields) -> None:
    """Part of a run in processes of its own; `kill` ends all of them before that step."""
    words = [str(run), str(words), *settings(**fields)]
    done = launch(REAL, *words, processes=processes) if processes > 1 else [start(REAL, *words).wait()]
    expected = -signal.SIGKILL if "kill" in fields else 0
    # A process may see the loss of another one before it is killed itself.
    assert done[0][0] == expected or "another process of the run is gone" in done[0][1], done


@pytest.mark.parametrize(
    "first, second",
    [
        ({"processes": 2, "method__queue": "sharded"}, {"processes": 1}),
        ({"processes": 1}, {"processes": 2, "method__queue": "sharded"}),
        ({"processes": 2}, {"processes": 1, "train__accumulate": 4}),
    ],
    ids=["two sharded to one", "one to two sharded", "two to one with micro-batches"],
)
def test_killed_and_continued_by_another_number_of_processes(words, whole, tmp_path, first, second):
    run = tmp_path / "run"
    leg(run, words, **first, kill=3)
    reached = checkpoint.load(checkpoint.newest(RunFolder(run).checkpoints))
    assert reached["step"] in (2, 3) and reached["world_size"] == first["processes"]
    leg(run, words, **second)
    assert shown(run) == shown(whole)
    assert checkpoint.load(RunFolder(run).last)["world_size"] == second["processes"]
    for a, b in zip(metrics(run), metrics(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3), a["step"]
    one, other = (checkpoint.load(RunFolder(path).last)["method"] for path in (run, whole))
    for name, rows in other.items():
        if ".pointer" in name:
            assert torch.equal(one[name], rows), name
        if name.startswith("queues.") and name.endswith("rows"):
            torch.testing.assert_close(one[name], rows, rtol=0, atol=2e-3, msg=name)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_two_gpus_show_and_learn_what_one_process_does(words, whole, tmp_path, kind):
    run = tmp_path / "run"
    leg(run, words, 2, train__device="cuda", method__queue=kind)
    assert {place: slot for place, (slot, _) in shown(run).items()} == {
        k: slot for k, (slot, _) in shown(whole).items()
    }
    for a, b in zip(metrics(run), metrics(whole), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02), a["step"]


def test_a_sharded_queue_gives_the_same_run_bit_for_bit(words, tmp_path):
    """Two micro-batches, more frame keys a step than rows, inter-level terms that see the keys of the step."""
    fields = {"train__steps": 3, "train__accumulate": 2, "method__inter_after_enqueue": "true"}
    for kind in ("sharded", "replicated"):
        done = launch(REAL, str(tmp_path / kind), str(words), *settings(**fields, method__queue=kind))
        assert [status for status, _ in done] == [0, 0], done
    assert_same_run(tmp_path / "sharded", tmp_path / "replicated")
    queues = checkpoint.load(RunFolder(tmp_path / "sharded").last)["method"]
    assert queues["queues.frame.rows"].shape == (64, 16)
