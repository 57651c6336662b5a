"""The query and its permuted copy as one batch give what two passes of their own give."""

import pytest
import torch

from rcmstr_fast.methods import build_method, network
from tests.methods.tiny import random_batch, tiny_config

CASES = [
    ("resnet29", {"name": "rclstr"}),
    ("resnet29", {"name": "rclstr", "bn_group_size": 2, "batch": 5}),
    ("resnet29", {"name": "rcmstr", "coupled": True}),
    ("resnet29", {"name": "rclstr", "division": "drop_boundary"}),
    ("vit_tiny", {"name": "rcmstr", "bn_group_size": 2}),
    ("vit_tiny", {"name": "rcmstr", "coupled": True}),
    ("vit_tiny", {"name": "rclstr", "division": "vertical_projection"}),
]


def step(config, tps=False):
    """Terms, gradients and buffers after one step in float64."""
    method = build_method(config).double().train()
    batch = random_batch(config, config.train.global_batch_size)
    batch.views = {name: view.double() for name, view in batch.views.items()}
    method.begin_step()
    output = method(batch)
    output.loss.backward()
    method.end_step()
    gradients = {name: p.grad for name, p in method.online.named_parameters() if p.grad is not None}
    return output.terms, gradients, dict(method.named_buffers())


def apart(part, x, passes):
    """Every pass on its own."""
    return torch.cat([part(piece) for piece in x.chunk(passes)])


@pytest.mark.parametrize(("encoder", "options"), CASES, ids=str)
def test_equal_to_passes_of_their_own(monkeypatch, encoder, options):
    config = tiny_config(encoder, **options)
    config.model.tps = "trainable" if options["name"] == "rclstr" else "none"
    together = step(config)
    monkeypatch.setattr(network, "_in_passes", apart)
    for one, other in zip(together, step(config), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            # features are normalised in float32
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_without_permutation_there_is_one_pass(monkeypatch):
    seen = []
    whole = network._in_passes
    monkeypatch.setattr(network, "_in_passes", lambda part, x, passes: seen.append(passes) or whole(part, x, passes))
    step(tiny_config(name="seqmoco"))
    assert set(seen) == {1}
