"""Every method has a plain PyTorch writing: it has our loss, and a step of it changes what a step of ours changes."""

import json
import os

import pytest
import torch

from bench.report import performance
from bench.report.rows import load
from bench.step.plain import PlainBatchNorm, PlainStep, plain_operations
from rcmstr_fast.cli.main import main
from rcmstr_fast.measure.running import OurStep, first_loss, initial_state, made_up_batches
from rcmstr_fast.models.batch_norm import norms_of
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.optim import RATE
from tests.bench.tiny import CPU
from tests.methods.harness import case_config
from tests.methods.test_every_method import cases


@pytest.mark.parametrize("case", cases(), ids=":".join)
def test_it_takes_the_step_of_the_trainer(case, tmp_path):
    config = case_config(*case)
    config.method.bn_group_size = 0  # batch norm of the whole batch is what torch has
    config.optim.name, config.optim.clip, config.optim.weight_decay = "sgd", 0.0, 0.0
    world = World(CPU)
    ours = OurStep(config, world, tmp_path / "run")
    plain = PlainStep(config, CPU, initial_state(config, world))
    assert all(isinstance(layer, PlainBatchNorm) for layer in norms_of(plain.method))
    batch = made_up_batches(config, ours.plan, world, 1)[0]
    assert plain.first_loss(batch[0]) == pytest.approx(first_loss(config, world, batch[0]), rel=1e-4)
    ours.step(batch)
    for group in plain.optimizer.param_groups:
        group["lr"] = config.optim.lr / 4 * group.get(RATE, 1.0)  # the trainer's first step, of a warm-up of four
    plain.step(batch)
    theirs, before = dict(plain.method.named_parameters()), initial_state(config, world)
    named = {name: x for name, x in ours.trainer.method.named_parameters() if x.requires_grad}
    wanted, moved = (torch.cat([(side[name] - before[name]).flatten() for name in named]) for side in (named, theirs))
    # In float32 so small a CNN amplifies the rounding of a sum to per cents of the gradient.
    assert float((moved - wanted).norm()) < 0.05 * float(wanted.norm())


def test_the_order_of_backends_ends_with_the_step(monkeypatch):
    monkeypatch.setenv("RCMSTR_FAST_BACKEND", "chunked")
    monkeypatch.delenv("RCMSTR_FAST_MASKED_STAGES", raising=False)
    with plain_operations():
        assert os.environ["RCMSTR_FAST_BACKEND"] == "reference"
    assert os.environ["RCMSTR_FAST_BACKEND"] == "chunked" and "RCMSTR_FAST_MASKED_STAGES" not in os.environ


def test_the_command_measures_recipes_and_the_page_shows_them(tmp_path, capsys):
    words = ["bench", "methods", "--batch", "2", "--repetitions", "1", "--out", str(tmp_path)]
    assert main([*words, "--recipes", "tiny_vit_rotnet"]) == 0
    (path,) = tmp_path.glob("*/methods-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(r["provider"], r["status"], r["by_hand"]) for r in rows] == [("ours", "ok", False), ("eager", "ok", False)]
    shown = performance.methods(load(tmp_path))
    assert "`tiny_vit_rotnet`" in shown and "reference operations" in shown
    assert main([*words, "--recipes", "nothing"]) == 2
    assert "recipes must begin a name" in capsys.readouterr().err
