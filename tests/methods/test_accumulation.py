"""A step in several micro-batches is the step in one: the divisor of loss_mim (Eq. 8) counts the whole step."""

import pytest
import torch

from rcmstr_fast.methods import Batch, build_method
from rcmstr_fast.methods.protocol import Local
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.guard import Guard
from rcmstr_fast.train.log import Meter
from rcmstr_fast.train.optim import build_optimizer
from rcmstr_fast.train.step import Step
from tests.methods.tiny import random_batch, tiny_config

CPU = World(torch.device("cpu"))
IMAGES = 8


def reconstruction(encoder, parts, collectives=None):
    """loss_mim of a step in `parts` micro-batches, the gradients of its head, and hidden pixels a micro-batch."""
    config = tiny_config(encoder, IMAGES, name="rcmstr", bn_group_size=2)
    config.train.accumulate, config.train.precision = parts, "fp64"
    method = build_method(config, collectives or Local()).double().train()
    meter = Meter()
    step = Step(config, CPU, method, build_optimizer(method, config.optim), Guard(3, CPU), meter)
    step.set(1, 0, 0.0)
    whole = random_batch(config, IMAGES, seed=3)
    micro = [
        Batch({name: view.chunk(parts)[i].double() for name, view in whole.views.items()}, index, step.epoch)
        for i, index in enumerate(whole.index.chunk(parts))
    ]
    hidden = [int(method.mim.masks(batch).pixels.sum()) for batch in micro]
    step(micro, monitor=False)
    return meter.read(CPU)["loss_mim"], {name: p.grad for name, p in method.mim.head.named_parameters()}, hidden


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_any_division_gives_the_same_reconstruction(encoder):
    loss, gradients, _ = reconstruction(encoder, 1)
    for parts in (2, 4):
        again, others, hidden = reconstruction(encoder, parts)
        assert len(set(hidden)) > 1  # else each micro-batch's own count would do
        assert again == pytest.approx(loss, rel=1e-6)  # the meter's terms are float32
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
