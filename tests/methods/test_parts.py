"""The parts that methods share, against formulas and torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rcmstr_fast.config import PretrainConfig, resolve
from rcmstr_fast.methods import ViewSpec, settings
from rcmstr_fast.methods.parts.heads import Instances, build_head
from rcmstr_fast.methods.parts.labels import LabelSettings
from rcmstr_fast.methods.parts.masking import masked_l1
from rcmstr_fast.methods.parts.momentum import Momentum, MomentumSettings
from rcmstr_fast.methods.parts.monitors import entropy, pair_accuracy, spread
from rcmstr_fast.train.distributed import World, joined
from rcmstr_fast.train.targets import Targets
from rcmstr_fast.train.views import ViewMaker
from tests.methods.harness import pictures
from tests.train.launch import launch


@pytest.mark.parametrize("frames", [26, 32, 9])
def test_instances_are_torchs_pooling(frames):
    x = torch.rand(3, frames, 5, dtype=torch.float64)
    pooled = F.adaptive_avg_pool1d(x.transpose(1, 2), 5).transpose(1, 2)
    torch.testing.assert_close(Instances("window", frames, 5).double()(x), pooled)
    torch.testing.assert_close(Instances("all", frames).double()(x), x.mean(1, keepdim=True))
    assert Instances("frame", frames)(x) is x and Instances("flatten", frames)(x).shape == (3, 1, 5 * frames)


@pytest.mark.parametrize("kind", ["none", "linear", "mlp", "bilstm"])
def test_heads_say_how_wide_they_are(kind):
    head = build_head(kind, 6, 4, hidden=8, layers=3)
    assert head(torch.rand(2, 5, 6)).shape == (2, 5, 6 if kind == "none" else 4)


def test_momentum_rises_by_half_a_cosine():
    net = nn.Linear(2, 2).double()
    follower = Momentum(net, MomentumSettings(0.9, "cosine"))
    for progress in (0.0, 0.25, 0.75):
        with torch.no_grad():
            net.weight.add_(1.0)
        before = follower.network.weight.clone()
        follower.update(net, torch.tensor(progress))
        m = 1 - 0.1 * 0.5 * (1 + math.cos(math.pi * progress))
        torch.testing.assert_close(follower.network.weight, m * before + (1 - m) * net.weight, rtol=1e-6, atol=1e-7)


def test_monitors_tell_collapse():
    rows = F.normalize(torch.randn(300, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    assert spread(rows) > 0.9 and spread(rows[:1].expand(300, -1)) < 1e-6
    assert pair_accuracy(rows, rows) == 1 and pair_accuracy(rows, rows.flip(0)) < 0.1
    even, one = torch.full((4, 8), 1 / 8), F.one_hot(torch.zeros(4, dtype=torch.int64), 8)
    assert entropy(even) == pytest.approx(1.0) and entropy(one) < 1e-6


def test_masked_l1_by_loops():
    prediction, target = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    mask = torch.rand(2, 1, 4, 5) < 0.5
    parts = [abs(prediction[b, c, y, x] - target[b, c, y, x]) for b, _, y, x in mask.nonzero() for c in range(3)]
    torch.testing.assert_close(masked_l1(prediction, target, mask), torch.stack(parts).mean())
    assert masked_l1(prediction, target, torch.zeros_like(mask)) == 0


def test_views_by_preset_and_size():
    config = resolve(PretrainConfig(method=settings("rclstr")))
    specs = (ViewSpec("a"), ViewSpec("plain", preset="none"), ViewSpec("b"), ViewSpec("small", size=(16, 48)))
    index = torch.arange(4)
    images = pictures(index, 32, 100)
    found = ViewMaker(specs, config)(images, index, 0, None, torch.float32)
    assert list(found) == ["a", "plain", "b", "small"] and found["small"].shape == (4, 3, 16, 48)
    torch.testing.assert_close(found["plain"], images.permute(0, 3, 1, 2) / 127.5 - 1)
    assert not torch.equal(found["a"], found["b"])
    alone = ViewMaker((ViewSpec("a"), ViewSpec("b")), config)(images, index, 0, None, torch.float32)
    assert torch.equal(alone["a"], found["a"]) and torch.equal(alone["b"], found["b"])


def test_targets_end_with_minus_one():
    made = Targets(LabelSettings("36", 4))(["ab", None, "a€b1234"])
    assert made["lengths"].tolist() == [2, 0, 4] and made["targets"].shape == (3, 4)
    assert made["targets"][0].tolist() == [10, 11, -1, -1] and made["targets"][2].tolist() == [10, 11, 1, 2]


def gathered_gradient(world: World) -> torch.Tensor:
    """Gradient of w in the mean over all rows of a loss that compares each row with all, as the trainer averages it."""
    x = torch.arange(12.0, dtype=torch.float64).sin().view(4, 3)
    mine = x.chunk(world.world_size)[world.rank]
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    rows = mine * w
    torch.logsumexp(rows @ world.gather_with_grad(rows).T, dim=1).mean().backward()
    return world.mean(w.grad)


def main(argv: list[str]) -> int:
    with joined("cpu") as world:
        gradient = gathered_gradient(world)
        if world.rank == 0:
            torch.save(gradient, argv[0])
    return 0


def test_gathering_keeps_the_gradient(tmp_path):
    done = launch("tests.methods.test_parts", str(tmp_path / "gradient.pt"))
    assert [status for status, _ in done] == [0, 0], done
    torch.testing.assert_close(torch.load(tmp_path / "gradient.pt"), gathered_gradient(World(torch.device("cpu"))))
