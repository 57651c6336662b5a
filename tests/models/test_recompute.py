"""Activation checkpointing: less is kept, nothing else changes."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from rcmstr_fast import ops
from rcmstr_fast.config import ModelConfig
from rcmstr_fast.models import build_encoder
from rcmstr_fast.models.batch_norm import batch_norm_state, norms_of


def make(encoder):
    torch.manual_seed(0)
    return build_encoder(ModelConfig(encoder=encoder, width=0.25, depth=2)).train()


def run(encoder, images, masked, checkpointing):
    """Result, gradients and buffers of a pass in two parts, and the bytes kept for backward."""
    net = make(encoder)
    net.checkpointing = checkpointing
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with batch_norm_state(norms_of(net), passes=1 if masked else 2), saved_tensors_hooks(pack, lambda x: x):
        if masked:
            size = tuple(images.shape[2:])
            unit = "token" if encoder == "vit_tiny" else "stage3"
            masks = ops.draw_masks(
                torch.arange(len(images)), seed=0, epoch=0, size=size, unit=unit, mask_ratio=0.5, num_blocks=1
            )
            out = net.forward_masked(images, masks, "anchored")[0]
        else:
            out = net(images)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    (out * weights).sum().backward()
    return out.detach(), {n: p.grad for n, p in net.named_parameters()}, dict(net.named_buffers()), sum(kept.values())


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_and_statistics_are_the_same_and_less_is_kept(encoder, masked):
    images = torch.rand(4, 3, 32, 128 if encoder == "vit_tiny" else 100) * 2 - 1
    out, gradients, buffers, kept = run(encoder, images, masked, False)
    again, again_gradients, again_buffers, again_kept = run(encoder, images, masked, True)
    assert torch.equal(out, again)
    assert gradients.keys() == again_gradients.keys()
    for name, gradient in gradients.items():
        other = again_gradients[name]
        assert (gradient is None) == (other is None) and (gradient is None or torch.equal(gradient, other)), name
    for name, value in buffers.items():
        assert torch.equal(value, again_buffers[name]), name
    assert again_kept < 0.6 * kept


def test_nothing_is_recomputed_without_gradients():
    net = make("vit_tiny")
    net.checkpointing = True
    calls = []
    net.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        net(torch.zeros(1, 3, 32, 128))
    assert calls == [1]
