"""The baseline of the step benchmark computes what our step computes: loss, every gradient, the state after a step.

The networks compute in float64 there: batch norm over a few images amplifies float32's rounding a thousandfold.
"""

import dataclasses

import pytest
import torch

from bench.step import baseline as module
from bench.step.baseline import Baseline
from bench.step.providers import build
from rcmstr_fast.config import ConfigError
from rcmstr_fast.methods import build_method
from tests.bench.tiny import CPU, step_batch, tiny, tiny_batch

CASES = [
    ("resnet29", {"name": "rcmstr"}),
    ("resnet29", {"name": "rcmstr", "mask_rule": "any", "mask_unit": "lattice"}),
    ("resnet29", {"name": "rclstr", "inter": "s2w", "levels": ["subword"]}),
    ("resnet29", {"name": "seqmoco", "kl": False}),
    ("vit_tiny", {"name": "rcmstr"}),
    ("vit_tiny", {"name": "seqmoco"}),
]


def ours_and_theirs(encoder, fields):
    config = tiny(encoder, **fields)
    method = build_method(config).train()
    return config, method, build("eager", config, CPU, method.state_dict()), tiny_batch(config)


def networks_in_double(method):
    for name, child in method.named_children():
        if name not in ("queues", "loss"):
            child.double()


@pytest.mark.parametrize(("encoder", "fields"), CASES, ids=str)
def test_loss_and_gradients_are_ours(encoder, fields, monkeypatch):
    config, method, baseline, batch = ours_and_theirs(encoder, fields)
    monkeypatch.setattr(module, "CHUNK", 40 * config.method.queue_size)  # several chunks
    networks_in_double(method)
    networks_in_double(baseline)
    permuted = None if batch.permuted is None else batch.permuted.double()
    batch = dataclasses.replace(batch, query=batch.query.double(), key=batch.key.double(), permuted=permuted)
    output = method(step_batch(batch))
    output.loss.backward()
    loss, key = baseline.gradients(batch)
    assert float(loss.detach()) == pytest.approx(float(output.loss.detach()), rel=1e-5)
    expected = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in baseline.named_parameters() if p.grad is not None}
    assert set(found) == set(expected) and len(found) > 20
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm()
        assert error <= 1e-4 * gradient.norm() + 1e-6 * whole, f"{name}: {error} at {gradient.norm()}"
    assert set(key) == set(method.levels)


def test_losses_agree_in_single_precision():
    _, method, baseline, batch = ours_and_theirs("resnet29", {"name": "rcmstr"})
    with torch.no_grad():
        expected = method(step_batch(batch)).loss
    assert float(baseline.gradients(batch)[0]) == pytest.approx(float(expected), rel=1e-4)


def test_a_step_moves_weights_momentum_network_and_queues():
    _, _, baseline, batch = ours_and_theirs("resnet29", {"name": "rcmstr"})
    before = {name: x.clone() for name, x in baseline.state_dict().items()}
    with torch.no_grad():
        for p in baseline.online.parameters():
            p.add_(0.01)
    first = baseline.step(batch)
    second = baseline.step(batch)
    after = baseline.state_dict()
    assert torch.isfinite(first) and not torch.equal(first, second)
    momentum, online = "momentum.network.projector.layers.0.linear.weight", "online.projector.layers.0.linear.weight"
    assert not torch.equal(after[momentum], before[momentum]) and not torch.equal(after[online], before[online])
    for level, rows in (("frame", 4 * 26), ("subword", 16), ("word", 4)):
        assert int(after[f"queues.{level}.pointer"]) == 2 * min(rows, 96) % 96
        written = after[f"queues.{level}.rows"]
        torch.testing.assert_close(written.norm(dim=1), torch.ones(96))
        assert not torch.equal(written[0], before[f"queues.{level}.rows"][0])


def test_enqueue_writes_over_the_oldest_rows():
    baseline = Baseline(tiny(name="seqmoco"), CPU, bf16=False)
    queue = baseline.queues["subword"]
    queue.rows.zero_()
    queue.pointer.fill_(94)
    baseline.enqueue({"subword": torch.arange(1.0, 5.0)[:, None].expand(4, 16)})
    assert queue.rows[:, 0].nonzero().flatten().tolist() == [0, 1, 94, 95]
    assert queue.rows[[94, 95, 0, 1], 0].tolist() == [1, 2, 3, 4] and int(queue.pointer) == 2


def test_a_switch_it_lacks_is_named():
    config = tiny(coupled=True)
    with pytest.raises(ConfigError, match=r"baseline step does not have method\.coupled=True"):
        Baseline(config, CPU, bf16=False)
