"""The division of a step over processes and micro-batches, schedules, optimisers, and the order of the words."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError, ModelConfig
from rcmstr_fast.evaluation.assemble import build_recogniser
from rcmstr_fast.evaluation.config import ProbeConfig, check
from rcmstr_fast.evaluation.schedule import Order, Schedule, build_optimizer, layer_rates, learning_rate
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.adadelta import Adadelta
from rcmstr_fast.train.optim import RATE
from tests.evaluation.pairs import tiny_segmentation
from tests.evaluation.rendered import tiny_config
from tests.evaluation.toy_fit import main
from tests.train.launch import launch, torchrun

CLOCK = ("images_per_s", "data_wait_percent", "memory_gib", "seconds")


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in CLOCK} for line in found]


def close(one, other, fields, but=()):
    """Metrics, and weights (which move by some 1e-4 a step), of two divisions of the same run."""
    tolerance, of_weights = (1e-8, 1e-9) if fields.get("precision") == "fp64" else (1e-4, 1e-5)
    for a, b in zip(lines(one), lines(other), strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance), a["step"]
    a, b = (checkpoint.load(run / "checkpoints/last.pt")["recogniser"] for run in (one, other))
    assert a.keys() == b.keys()
    for name, x in a.items():
        if any(word in name for word in but):
            continue
        torch.testing.assert_close(x.double(), b[name].double(), rtol=0, atol=of_weights, msg=name)


#: Steps of a trained encoder, in float64: so small a network in float32 amplifies the rounding of a division to per mille
#: in two steps (ties of max pools on white paper).
TRAINED = {
    "mode": "finetune",
    "bn_group_size": 4,
    "steps": 5,
    "eval_every": 5,
    "log_every": 1,
    "augment": "light",
    "decoder": "attention",
    "precision": "fp64",
}
FROZEN = {"decoder": "ctc", "steps": 9, "eval_every": 3, "log_every": 1}


#: The same of a segmentation, which `toy_fit` runs; it saves at every step.
SEGMENTED = {
    "segment": True,
    "mode": "finetune",
    "bn_group_size": 4,
    "steps": 4,
    "eval_every": 1,
    "log_every": 1,
    "augment": "light",
    "precision": "fp64",
}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [TRAINED, FROZEN], ids=["finetune", "kept_frames"])
def test_two_processes_equal_one(tmp_path, fields):
    """Texts of different lengths weigh the same whoever reads them; kept frames lie where their owner is."""
    words = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
    tiny_config(tmp_path)  # writes the words
    done = launch("tests.evaluation.toy_fit", str(tmp_path / "two"), str(tmp_path), *words)
    assert [status for status, _ in done] == [0, 0], done
    assert main([str(tmp_path / "one"), str(tmp_path), *words]) == 0
    close(tmp_path / "one", tmp_path / "two", fields)
    one, two = (json.loads((tmp_path / run / "results.json").read_text())["sets"] for run in ("one", "two"))
    assert one == two
    if fields is FROZEN:
        assert "training frames: kept" in (tmp_path / "two/log.txt").read_text()


@pytest.mark.slow
def test_segmentation_under_torchrun(tmp_path):
    """Two processes equal one; killed within and between the files of a save, and started again, they are bit exact."""
    words = [str(tmp_path), *(f"{name}={json.dumps(value)}" for name, value in SEGMENTED.items())]
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    tiny_segmentation(tmp_path)
    assert main([str(one), *words]) == 0
    points = ["within:next.pt", "before:last.pt"]
    for run, die in ((two, []), (killed, [f"die={','.join(points)}"])):
        ended = torchrun("tests.evaluation.toy_fit", str(run), *words, *die, restarts=2)
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert Path(f"{killed}.died").read_text().splitlines() == points
    close(one, two, SEGMENTED)
    assert lines(killed) == lines(two)
    a, b = (checkpoint.load(run / "checkpoints/last.pt")["recogniser"] for run in (killed, two))
    assert all(torch.equal(a[name], b[name]) for name in a)
    first, *others = (json.loads((run / "results.json").read_text())["sets"] for run in (one, two, killed))
    assert all(other == first for other in others)


def test_accumulation_equals_the_whole_batch(tmp_path):
    words = [f"{name}={json.dumps(value)}" for name, value in TRAINED.items()]
    tiny_config(tmp_path)
    assert main([str(tmp_path / "whole"), str(tmp_path), *words]) == 0
    assert main([str(tmp_path / "parts"), str(tmp_path), *words, "accumulate=4"]) == 0
    close(
        tmp_path / "whole", tmp_path / "parts", TRAINED, but=("running", "batches_tracked")
    )  # they move once a micro-batch


@pytest.mark.slow
def test_two_processes_are_continued_bit_exact(tmp_path):
    """Also with dropout, whose random numbers are each process's own."""
    fields = FROZEN | {"decoder": "transformer", "memory": "frames", "steps": 4, "eval_every": 2}
    words = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
    tiny_config(tmp_path)
    whole = launch("tests.evaluation.toy_fit", str(tmp_path / "whole"), str(tmp_path), *words)
    part = launch("tests.evaluation.toy_fit", str(tmp_path / "run"), str(tmp_path), *words, "term=3")
    rest = launch("tests.evaluation.toy_fit", str(tmp_path / "run"), str(tmp_path), *words)
    assert [status for status, _ in whole + part + rest] == [0, 0, 143, 143, 0, 0], part
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    a, b = (checkpoint.load(tmp_path / run / "checkpoints/last.pt")["recogniser"] for run in ("run", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_batches_that_cannot_be_divided():
    config = ProbeConfig(batch_size=10, accumulate=4)
    with pytest.raises(ConfigError, match=r"processes \* accumulate = 2 \* 4"):
        Schedule.make(config, 100, 2)
    assert Schedule.make(ProbeConfig(batch_size=16, accumulate=2, steps=3), 13, 2).batch_size == 12


@pytest.mark.parametrize("owned", [False, True])
def test_every_word_of_a_step_is_somebodys(owned):
    schedule = Schedule(12, 3, 5, 5)
    order = Order(schedule, [40], [], 3)
    parts = [list(order.micros(1, 2, rank, 3, owned)) for rank in range(3)]
    for step in range(1, 5):
        mine = [[m for m in own if m.step == step] for own in parts]
        assert all([m.last for m in own] == [False, True] for own in mine)
        batch = mine[0][0].batch
        shown = np.concatenate([m.positions for own in mine for m in own])
        assert sorted(shown) == sorted(batch) and len(set(shown)) == 12
        slots = {int(p): int(s) for own in mine for m in own for p, s in zip(m.positions, m.slots, strict=True)}
        assert len(set(slots.values())) == 12
        if owned:
            assert all((m.positions % 3 == rank).all() for rank, own in enumerate(mine) for m in own)
        else:
            assert all(len(m.positions) == 2 for own in mine for m in own)


def test_training_sets_are_mixed_by_weight():
    """MJ and ST half and half although one is nine times the other; without weights each word once an epoch."""
    schedule = Schedule(10, 10, 100, 10)
    mixed, plain = Order(schedule, [90, 10], [1, 1], 0), Order(schedule, [90, 10], [], 0)
    shown = np.concatenate([mixed.batch(step)[2] for step in range(10)])
    assert (shown < 90).sum() == 50 and np.bincount(shown[shown >= 90]).max() == 5
    assert sorted(np.concatenate([plain.batch(step)[2] for step in range(10)])) == list(range(100))
    with pytest.raises(ConfigError, match="train_weights must be one positive number for each of 2 roots"):
        Order(schedule, [90, 10], [1], 0)


@pytest.mark.parametrize("total", [1, 5, 40, 200])
def test_one_cycle_is_that_of_torch(total):
    config = ProbeConfig(lr=2e-3)
    weights = [torch.zeros(1, requires_grad=True)]
    optimizer = torch.optim.Adam(weights)
    torchs = OneCycleLR(
        optimizer, 2e-3, total_steps=total, pct_start=0.075, cycle_momentum=False, div_factor=20, final_div_factor=1000
    )
    for step in range(total):
        expected = torchs.get_last_lr()[0]
        assert learning_rate(step, config, Schedule(1, 1, total, 1)) == pytest.approx(expected, rel=1e-9), step
        optimizer.step()
        if step + 1 < total:
            torchs.step()


def test_schedules_of_dig_and_seqclr():
    dig = ProbeConfig(optimizer="adamw", epochs=10, batch_size=10, min_lr=1e-6)
    schedule = Schedule.make(dig, 100)
    assert schedule.warmup_steps == 10 and dig.resolved_weight_decay == 0.05
    rates = [learning_rate(step, dig, schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-5 * (i + 1) for i in range(10)]) and rates[10] == pytest.approx(1e-4)
    assert rates[55] == pytest.approx((1e-4 + 1e-6) / 2) and np.all(np.diff(rates[10:]) < 0)
    seqclr = ProbeConfig(optimizer="adadelta")
    rates = [learning_rate(step, seqclr, Schedule(1, 100, 100, 1)) for step in (0, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([10, 10, 1, 1, 0.1, 0.1])
    assert seqclr.resolved_weight_decay == 1e-4 and seqclr.clip == 5


@pytest.mark.parametrize("fields", [dict(encoder="vit_tiny", depth=2), dict(encoder="resnet29", width=0.25)])
def test_layer_decay(tmp_path, fields):
    config = ProbeConfig(
        encoder="random", mode="finetune", model=ModelConfig(**fields), optimizer="adamw", layer_decay=0.5
    )
    recogniser = build_recogniser(config, Charset.load("36"))
    rates = layer_rates(recogniser, 0.5)
    if "depth" in fields:
        assert rates["encoder.patch_embed.proj.weight"] == rates["encoder.mask_token"] == 0.125
        assert rates["encoder.blocks.0.norm1.bias"] == 0.25 and rates["encoder.blocks.1.mlp.fc1.weight"] == 0.5
        assert rates["encoder.norm.weight"] == rates["decoder.classifier.bias"] == 1
    else:
        stages = [next(x for name, x in rates.items() if name.startswith(f"encoder.stages.{i}.")) for i in range(6)]
        assert stages == [0.5 ** (6 - i) for i in range(6)]
    groups = build_optimizer(recogniser, config).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(recogniser.parameters()))
    named = {id(p): name for name, p in recogniser.named_parameters()}
    for group in groups:
        assert {rates[named[id(p)]] for p in group["params"]} == {group[RATE]}
        matrices = {p.numel() > max(p.shape) for p in group["params"]}
        assert matrices == {group["weight_decay"] == 0.05}


def test_seqclr_trains_with_adadelta(tmp_path):
    config = tiny_config(tmp_path, optimizer="adadelta")
    optimizer = build_optimizer(build_recogniser(config, Charset.load("36")), config)
    assert isinstance(optimizer, Adadelta) and optimizer.param_groups[0]["rho"] == 0.95


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lr": 0.0}, "lr must be more than 0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"subset": 1.5}, "subset must be more than 0 and at most 1"),
        ({"accumulate": 0}, "accumulate must be"),
        ({"cache_gib": -1.0}, "cache_gib must be"),
        ({"max_length": 0}, "max_length must be"),
        ({"batch_size": 10**30}, "batch_size must be"),
        ({"train_weights": [1.0, 2.0]}, "one number for each folder"),
        ({"layer_decay": 0.75}, "layer_decay goes with"),
        ({"warmup_steps": 3}, "warmup_steps goes with"),
        ({"val_fraction": 0.0}, "val_fraction must be more than 0"),
        ({"steps": 0, "epochs": 0}, "must be positive"),
    ],
)
def test_numbers_out_of_range_are_one_line(changes, message):
    fields = dict(encoder="random", train=["a"], test=["b"]) | changes
    with pytest.raises(ConfigError, match=message) as raised:
        check(ProbeConfig(**fields))
    assert "\n" not in str(raised.value)
