import pytest
import torch

from rcmstr_fast.config import RunError
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.runfolder import RunFolder
from tests.train.compare import metrics, tensors
from tests.train.toy import toy_run


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_one_bad_step_changes_nothing(tmp_path, name, clip):
    fields = {"optim__name": name, "optim__clip": clip, "optim__schedule": "constant", "optim__warmup_steps": 0}
    good = toy_run(tmp_path / "good", **fields, train__steps=3)
    bad = toy_run(tmp_path / "bad", **fields, train__steps=4, poison={3})
    states = [checkpoint.load(RunFolder(run).last) for run in (good, bad)]
    for part in ("method", "optimizer"):
        one, other = (tensors(state[part]) for state in states)
        for key in one:
            still = not any(word in key for word in ("momentum_encoder", "queue", "pointer", "num_batches"))
            assert not still or torch.equal(one[key], other[key]), key
    assert metrics(bad)[-1]["nonfinite"] == 1 and metrics(good)[-1]["nonfinite"] == 0


def test_first_step_bad_leaves_sgd_momentum_clean(tmp_path):
    run = toy_run(tmp_path / "run", optim__name="sgd", poison={0}, train__steps=6)
    for name, value in tensors(checkpoint.load(RunFolder(run).last)["method"]).items():
        assert torch.isfinite(value.float()).all(), name
    assert metrics(run)[-1]["loss"] < 10


def test_window_of_bad_steps_has_no_mean(tmp_path):
    run = toy_run(tmp_path / "run", poison={2, 3}, train__steps=6)
    assert [line["loss"] is None for line in metrics(run)] == [False, True, False]


def test_several_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(RunError, match=r"step 5: not finite: loss, loss_info on rank 0; stopped after 3 such steps"):
        toy_run(tmp_path / "run", poison={1, 4, 5, 6})
    assert "step 5: not finite" in RunFolder(tmp_path / "run").text.read_text()
    with pytest.raises(RunError, match="after 3"):  # the count is part of the checkpoint
        toy_run(tmp_path / "run", poison={5, 6})
