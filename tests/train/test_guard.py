import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rcmstr_fast.config import OptimConfig, RunError
from rcmstr_fast.train import checkpoint, trainer
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.export import export_encoder
from rcmstr_fast.train.optim import learning_rate
from rcmstr_fast.train.plan import Plan
from rcmstr_fast.train.runfolder import RunFolder
from tests.train.compare import metrics, tensors
from tests.train.toy import ToyMethod, toy_config, toy_run


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_one_bad_step_changes_nothing(tmp_path, name, clip):
    fields = {"optim__name": name, "optim__clip": clip, "optim__schedule": "constant", "optim__warmup_steps": 0}
    good = toy_run(tmp_path / "good", **fields, train__steps=3)
    bad = tmp_path / "bad"
    with pytest.raises(RunError, match=r"the last step of the run changed nothing: it is saved .* it is not finished"):
        toy_run(bad, **fields, train__steps=4, poison={3})
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


def test_a_bad_end_is_not_finished_until_more_steps_are_good(tmp_path):
    for _ in range(2):
        with pytest.raises(RunError, match=r"step 5: not finite: .*; the last 2 steps of the run changed nothing"):
            toy_run(tmp_path / "run", train__steps=6, poison={4, 5})
    text = RunFolder(tmp_path / "run").text
    assert "finished at step" not in text.read_text() and "is finished" not in text.read_text()
    toy_run(tmp_path / "run", train__steps=8)
    assert "finished at step 8" in text.read_text()


@pytest.mark.parametrize("broken", ["weight", "running_var", "small buffer"])
def test_what_an_update_breaks_is_neither_saved_nor_exported(tmp_path, broken, monkeypatch):
    """The step itself is finite; what it leaves behind is not."""
    from rcmstr_fast.train.step import Step

    update = Step._update

    def breaking(self, terms):
        update(self, terms)
        if int(self.number) == 4:
            norm = self.method.online_encoder[1]
            place = {"weight": norm.weight, "running_var": norm.running_var, "small buffer": self.method.queue[0]}
            place[broken].data[0] = math.inf if broken == "running_var" else math.nan

    monkeypatch.setattr(Step, "_update", breaking)
    with pytest.raises(RunError, match=r"the updates have made .* not finite: .* the last checkpoint is from before"):
        toy_run(tmp_path / "run", train__save_every=1, train__steps=8)
    folder = RunFolder(tmp_path / "run")
    assert checkpoint.load(folder.last)["step"] == 3
    assert all(x.isfinite().all() for x in load_file(folder.encoder).values() if x.is_floating_point())
    monkeypatch.undo()
    toy_run(tmp_path / "run", train__save_every=1, train__steps=8)


def test_nothing_that_is_not_finite_is_exported(tmp_path):
    method = ToyMethod(toy_config(tmp_path), World(torch.device("cpu")))
    method.online_encoder[0].bias.data[2] = math.nan
    with pytest.raises(RunError, match=r"is not written: tensor encoder.0.bias is not finite"):
        export_encoder(method, tmp_path / "encoder.safetensors", toy_config(tmp_path), 1)
    assert not list(tmp_path.iterdir())


def test_a_rate_that_leaves_its_range_is_an_error(tmp_path, monkeypatch):
    for rate in (-1e-9, 0.011, math.nan):
        monkeypatch.setattr(trainer, "learning_rate", lambda *_, rate=rate: rate)
        with pytest.raises(RunError, match=r"step 1: the learning rate must be in \[0, 0.01\], got"):
            toy_run(tmp_path / str(rate))


@settings(max_examples=300, deadline=None)
@given(
    lr=st.floats(1e-30, 1e18),
    share=st.floats(0, 1),
    warmup=st.integers(0, 40),
    total=st.integers(1, 40),
    schedule=st.sampled_from(["cosine", "constant", "step"]),
    step=st.integers(0, 39),
)
def test_the_schedule_stays_between_0_and_the_rate(lr, share, warmup, total, schedule, step):
    plan = Plan(100, 10, total, warmup, 8, 8, 8, 10)
    config = OptimConfig(lr=lr, min_lr=min(lr, lr * share), schedule=schedule)
    assert 0 <= learning_rate(min(step, total - 1), config, plan) <= lr


def test_several_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(RunError, match=r"step 5: not finite: loss, loss_info on rank 0; stopped after 3 such steps"):
        toy_run(tmp_path / "run", poison={1, 4, 5, 6})
    assert "step 5: not finite" in RunFolder(tmp_path / "run").text.read_text()
    with pytest.raises(RunError, match="after 3"):  # the count is part of the checkpoint
        toy_run(tmp_path / "run", poison={5, 6})
