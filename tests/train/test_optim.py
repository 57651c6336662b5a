import itertools

import pytest
import torch
from torch import nn

from rcmstr_fast.config import ConfigError, OptimConfig, PretrainConfig, resolve
from rcmstr_fast.train.optim import apply_gradients, build_optimizer, is_vector, learning_rate, weight_decay
from rcmstr_fast.train.plan import make_plan


def config(**train) -> PretrainConfig:
    made = PretrainConfig()
    for name, value in train.items():
        setattr(made.train, name, value)
    return resolve(made)


def test_plan_counts_whole_batches():
    plan = make_plan(config(global_batch_size=32, accumulate=2, epochs=3), 100, world_size=4)
    assert (plan.steps_per_epoch, plan.total_steps, plan.local_batch, plan.micro_batch) == (3, 9, 8, 4)
    assert plan.save_every == 3 and [plan.epoch(s) for s in (0, 2, 3)] == [0, 0, 1]
    assert make_plan(config(global_batch_size=32, steps=7), 100, 1).total_steps == 7


@pytest.mark.parametrize(
    ("train", "images", "processes", "words"),
    [
        ({"global_batch_size": 64}, 63, 1, "at most the 63 images of an epoch, got 64"),
        ({"global_batch_size": 32}, 100, 3, "multiple of processes"),
        ({"global_batch_size": 32, "accumulate": 3}, 100, 1, "multiple of processes"),
        ({"global_batch_size": 8, "accumulate": 4}, 100, 2, "2 or more images"),
        ({"global_batch_size": 8, "log_every": 0}, 100, 1, "log_every must be at least 1"),
        ({"global_batch_size": 8, "epochs": 0}, 100, 1, "must be positive"),
    ],
)
def test_plan_refuses_what_does_not_fit(train, images, processes, words):
    with pytest.raises(ConfigError, match=words):
        make_plan(config(**train), images, processes)


def test_learning_rate_warms_up_and_falls():
    made = config(global_batch_size=10, steps=100)
    made.optim.lr, made.optim.min_lr = 1.0, 0.1
    plan = make_plan(made, 100, 1)
    rates = [learning_rate(step, made.optim, plan) for step in range(101)]
    assert plan.warmup_steps == 10
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    made.optim.schedule = "constant"
    assert learning_rate(70, made.optim, plan) == 1.0


def test_warm_up_is_at_most_5000_steps():
    made = config(global_batch_size=10, steps=1_000_000)
    assert make_plan(made, 100, 1).warmup_steps == 5000 == made.optim.warmup_steps


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.token = nn.Parameter(torch.ones(1, 1, 5))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_adamw_decays_matrices_only_and_sgd_everything():
    net = Net()
    assert is_vector(net.token) and is_vector(net.linear.bias) and not is_vector(net.linear.weight)
    groups = build_optimizer(net, OptimConfig(name="adamw", lr=1e-3, weight_decay=0.05)).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.05), (4, 0.0)]
    groups = build_optimizer(net, OptimConfig(name="sgd", lr=1e-3, weight_decay=1e-4)).param_groups
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(5, 1e-4)]


@pytest.mark.parametrize("name", ["adamw", "sgd", "adadelta"])
def test_update_equals_torch_with_clipping(name):
    made = OptimConfig(name=name, lr=0.1, weight_decay=0.01)
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    plain = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adadelta": torch.optim.Adadelta}[name]
    options = {"adamw": {"betas": (0.9, 0.999)}, "sgd": {"momentum": 0.9}, "adadelta": {"rho": 0.95}}[name]
    groups = [{"params": [theirs.weight], "weight_decay": 0.01}]
    groups.append({"params": [theirs.bias], "weight_decay": 0.0 if name == "adamw" else 0.01})
    reference = plain(groups, lr=0.1, foreach=False, **options)
    optimizer = build_optimizer(ours, made)
    for step in range(4):
        x = torch.randn(5, 4) * (10 if step % 2 else 0.1)
        for net in (ours, theirs):
            net.zero_grad()
            net(x).square().mean().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in ours.parameters()])
        apply_gradients(optimizer, 0.1, norm, torch.tensor(True), clip=1.0)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adadelta"])
def test_a_bad_step_changes_nothing(name):
    net = nn.Linear(3, 2)
    optimizer = build_optimizer(net, OptimConfig(name=name, lr=0.1, weight_decay=0.01))
    net(torch.ones(4, 3)).sum().backward()
    for finite in (False, True, False):
        net.weight.grad.fill_(1.0 if finite else float("nan"))
        before = [p.detach().clone() for p in net.parameters()]
        apply_gradients(optimizer, 0.1, torch.tensor(float("nan")), torch.tensor(finite), clip=0.0)
        same = all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        assert same != finite
    for state in optimizer.state.values():
        assert all(torch.isfinite(x).all() for x in state.values())


class Players(Net):
    def rates(self):
        return {"norm.": 4.0}


@pytest.mark.parametrize("name", ["adamw", "sgd", "adadelta"])
def test_a_player_has_its_own_rate(name):
    net = Players()
    optimizer = build_optimizer(net, OptimConfig(name=name, lr=0.1, weight_decay=0.0))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    apply_gradients(optimizer, torch.tensor(0.1), torch.tensor(1.0), torch.tensor(True), clip=0.0)
    moved = {n: (before[n] - p.detach()).mean() for n, p in net.named_parameters()}
    torch.testing.assert_close(moved["norm.weight"], 4 * moved["linear.weight"], rtol=1e-4, atol=0)


def test_the_step_schedule_falls_at_60_and_80_per_cent():
    made = config(global_batch_size=10, steps=100)
    made.optim.lr, made.optim.schedule, made.optim.warmup_steps = 10.0, "step", 0
    plan = make_plan(made, 100, 1)
    rates = [learning_rate(step, made.optim, plan) for step in (0, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([10, 10, 1, 1, 0.1, 0.1])


def test_weight_decay_rises_by_half_a_cosine_and_is_that_of_torch():
    """Each step is torch's AdamW with the decay of that step; a step that is not finite decays nothing."""
    optim = resolve(PretrainConfig(optim=OptimConfig(lr=0.1, weight_decay=0.04, weight_decay_end=0.4))).optim
    at = [float(weight_decay(torch.tensor(p), optim)) for p in (0.0, 0.25, 0.5, 1.0)]
    assert at == pytest.approx([0.04, 0.4 - 0.36 * (2 + 2**0.5) / 4, 0.22, 0.4], rel=1e-6)
    assert weight_decay(torch.tensor(0.5), OptimConfig()) is None
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 4), nn.Linear(3, 4)
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer(ours, optim)
    peer = torch.optim.AdamW([{"params": [theirs.weight]}, {"params": [theirs.bias], "weight_decay": 0.0}], lr=0.1)
    for step in range(4):
        decay = weight_decay(torch.tensor(step / 4), optim)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        finite = torch.tensor(step != 2)
        apply_gradients(optimizer, 0.1, torch.tensor(1.0), finite, 0.0, decay)
        peer.param_groups[0]["weight_decay"] = float(decay)
        if finite:
            peer.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q)
    with pytest.raises(ConfigError, match=r"optim\.name must be adamw for optim\.weight_decay_end, got 'sgd'"):
        resolve(PretrainConfig(optim=OptimConfig(name="sgd", weight_decay_end=0.4)))
