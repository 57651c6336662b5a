import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rcmstr_fast import ops
from rcmstr_fast.models.transformer import sinusoids
from rcmstr_fast.models.vit import SIZES, VisionTransformer


def small(width: int = 128) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(48, 3, depth=2, width=width).double()


def masks_of(batch: int, ratio: float = 0.7) -> ops.Masks:
    return ops.draw_masks(
        torch.arange(batch), seed=1, epoch=0, size=(32, 128), unit="token", mask_ratio=ratio, num_blocks=int(ratio > 0)
    )


@pytest.mark.parametrize(("name", "parameters"), [("vit_tiny", 5.3), ("vit_small", 21.3), ("vit_base", 37.9)])
def test_parameters(name, parameters):
    encoder = VisionTransformer(*SIZES[name])
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 1) == parameters


def test_arithmetic_and_frames_of_the_small_model():
    encoder = VisionTransformer(*SIZES["vit_small"]).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        assert encoder(torch.randn(1, 3, 32, 128)).shape == (1, 32, 384)
    assert round(counter.get_total_flops() / 2e9, 2) == 6.04


def test_frames_follow_the_width():
    assert small(width=96)(torch.randn(2, 3, 32, 96, dtype=torch.float64)).shape == (2, 24, 48)


def test_names_are_those_of_timm():
    names = set(small().state_dict())
    for name in (
        "patch_embed.proj.weight",
        "pos_embed",
        "norm.weight",
        "blocks.1.norm1.weight",
        "blocks.1.norm2.bias",
        "blocks.1.attn.qkv.bias",
        "blocks.1.attn.proj.weight",
        "blocks.1.mlp.fc1.weight",
        "blocks.1.mlp.fc2.bias",
    ):
        assert name in names
    assert len(names) == 2 * 12 + 6


def test_positions_are_fixed_and_distinct():
    positions = sinusoids(256, 384).double()
    assert torch.equal(positions[0], torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(192))
    assert torch.pdist(positions).min() > 1e-2
    assert "pos_embed" not in dict(small().named_parameters())


def test_frames_are_the_means_of_the_columns():
    encoder = small()
    tokens = torch.randn(2, 256, 48, dtype=torch.float64)
    expected = torch.stack([tokens[:, column::32].mean(1) for column in range(32)], dim=1)
    torch.testing.assert_close(encoder.masked_frames(tokens), expected)


def test_all_visible_masked_pass_is_the_dense_pass():
    encoder = small()
    images = torch.randn(2, 3, 32, 128, dtype=torch.float64)
    tokens, active = encoder.forward_masked(images, masks_of(2, 0.0), "anchored")
    assert active is None and tokens.shape == (2, 256, 48)
    torch.testing.assert_close(encoder.masked_frames(tokens), encoder(images), rtol=0, atol=1e-12)


def test_hidden_pixels_reach_neither_tokens_nor_gradients():
    encoder = small()
    images = torch.randn(3, 3, 32, 128, dtype=torch.float64)
    masks = masks_of(3)
    results = []
    for fill in (0.0, torch.nan):
        tokens, _ = encoder.forward_masked(images.masked_fill(masks.pixels, fill), masks, "anchored")
        results.append((tokens, torch.autograd.grad(tokens.square().mean(), list(encoder.parameters()))))
    assert results[1][0].isfinite().all() and torch.equal(results[0][0], results[1][0])
    for clean, poisoned in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=1e-12, atol=1e-12)


def test_hidden_tokens_become_the_learned_vector():
    encoder = small()
    assert not encoder.mask_token.any()
    images, masks = torch.randn(2, 3, 32, 128, dtype=torch.float64), masks_of(2)
    before, _ = encoder.forward_masked(images, masks, "anchored")
    dense = encoder(images)
    with torch.no_grad():
        encoder.mask_token.add_(torch.randn(48))
    after, _ = encoder.forward_masked(images, masks, "anchored")
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(encoder(images), dense)
    hidden = masks._replace(grid=torch.ones_like(masks.grid), pixels=torch.ones_like(masks.pixels))
    first, second = (encoder.forward_masked(torch.randn_like(images), hidden, "anchored")[0] for _ in range(2))
    assert torch.equal(first, second)


def test_errors_say_what_came():
    encoder = small()
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 32, 128\], got \[1, 3, 32, 100\]"):
        encoder(torch.randn(1, 3, 32, 100))
    masks = masks_of(1)._replace(grid=torch.zeros(1, 4, 32, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"masks.grid must be \[B, 8, 32\], got \[1, 4, 32\]"):
        encoder.forward_masked(torch.randn(1, 3, 32, 128), masks, "anchored")
    with pytest.raises(ValueError, match="multiples of 4, got 32x102"):
        VisionTransformer(48, 3, depth=1, width=102)


def test_mask_unit_is_the_token():
    assert small().mask_unit("column") == "token"
