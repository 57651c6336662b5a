import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rcmstr_fast import ops
from rcmstr_fast.models.batch_norm import set_bn_groups
from rcmstr_fast.models.resnet import ResNet29


def masks_of(batch: int, width: int = 100, unit: str = "stage3", ratio: float = 0.7) -> ops.Masks:
    index = torch.arange(batch)
    return ops.draw_masks(
        index, seed=1, epoch=0, size=(32, width), unit=unit, mask_ratio=ratio, num_blocks=int(ratio > 0)
    )


def small(group_size: int = 0) -> ResNet29:
    torch.manual_seed(0)
    encoder = ResNet29(0.25).double()
    set_bn_groups(encoder, group_size)
    return encoder


def gradients(encoder: ResNet29, features: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2), dtype=features.dtype)
    return list(torch.autograd.grad((features * weights).sum(), list(encoder.parameters())))


def test_parameters_and_arithmetic_of_the_full_network():
    encoder = ResNet29().eval()
    assert sum(p.numel() for p in encoder.parameters()) == 44_264_480
    assert encoder.out_channels == 512
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert encoder(torch.randn(1, 3, 32, 100)).shape == (1, 26, 512)
    assert round(counter.get_total_flops() / 2e9, 2) == 5.05


@pytest.mark.parametrize(
    ("width", "stages", "frames"),
    [
        (96, [(32, 96), (16, 48), (8, 24), (4, 25), (2, 26), (1, 25)], 25),
        (100, [(32, 100), (16, 50), (8, 25), (4, 26), (2, 27), (1, 26)], 26),
        (104, [(32, 104), (16, 52), (8, 26), (4, 27), (2, 28), (1, 27)], 27),
        (128, [(32, 128), (16, 64), (8, 32), (4, 33), (2, 34), (1, 33)], 33),
    ],
)
def test_sizes_of_stages_and_frames(width, stages, frames):
    encoder = ResNet29(0.25).eval()
    assert encoder.stage_sizes(32, width) == stages
    with torch.no_grad():
        images = torch.randn(2, 3, 32, width)
        assert encoder(images).shape == (2, frames, 128)
        features, active = encoder.forward_masked(images, masks_of(2, width), "anchored")
    assert features.shape == (2, frames, 128) and active.shape == (2, frames) and active.dtype == torch.bool


@pytest.mark.parametrize(
    ("unit", "rule", "group_size"),
    [
        ("lattice", "any", 2),
        ("stage3", "anchored", 0),
        ("stage3", "anchored", 2),
        ("column", "any", 0),
    ],
)
def test_all_visible_masked_pass_is_the_dense_pass(unit, rule, group_size):
    encoder = small(group_size)
    images = torch.randn(4, 3, 32, 100, dtype=torch.float64)
    features, active = encoder.forward_masked(images, masks_of(4, unit=unit, ratio=0.0), rule)
    frames = encoder(images)
    assert active.all()
    torch.testing.assert_close(features, frames, rtol=0, atol=1e-9)
    torch.testing.assert_close(encoder.masked_frames(features), frames, rtol=0, atol=1e-9)
    for masked, dense in zip(gradients(encoder, features), gradients(encoder, frames), strict=True):
        torch.testing.assert_close(masked, dense, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("unit", "rule"), [("lattice", "anchored"), ("stage3", "anchored"), ("stage3", "any"), ("column", "any")]
)
def test_hidden_pixels_reach_neither_features_nor_gradients_nor_buffers(unit, rule):
    encoder = small(group_size=2)
    images = torch.randn(4, 3, 32, 100, dtype=torch.float64)
    masks = masks_of(4, unit=unit)
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    clean, active = encoder.forward_masked(images.masked_fill(masks.pixels, 0.0), masks, rule)
    poisoned, _ = encoder.forward_masked(images.masked_fill(masks.pixels, torch.nan), masks, rule)
    torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)
    for got, expected in zip(gradients(encoder, poisoned), gradients(encoder, clean), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert 0 < active.double().mean() < 1 and not poisoned[~active].any()
    for name, value in encoder.named_buffers():
        assert torch.equal(value, before[name]), name


def test_visible_pixels_do_reach_the_features():
    encoder = small()
    images = torch.randn(2, 3, 32, 100, dtype=torch.float64)
    masks = masks_of(2)
    changed = torch.where(masks.pixels, images, images + torch.randn_like(images))
    first, _ = encoder.forward_masked(images, masks, "anchored")
    second, _ = encoder.forward_masked(changed, masks, "anchored")
    assert (first - second).abs().max() > 1e-3


def test_channels_last_changes_the_layout_alone():
    encoder = ResNet29(0.25)
    images = torch.randn(2, 3, 32, 100)
    expected = encoder(images)
    encoder = encoder.to(memory_format=torch.channels_last)
    got = encoder(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 64, 100), (2, 1, 32, 100), (3, 32, 100)])
def test_other_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 32, W\], got"):
        ResNet29(0.25)(torch.randn(shape))


def test_mask_unit_is_the_configured_one():
    assert ResNet29(0.25).mask_unit("column") == "column"
