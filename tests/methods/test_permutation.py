import pytest
import torch
import torch.nn.functional as F

from rcmstr_fast import ops
from rcmstr_fast.config import ConfigError
from rcmstr_fast.methods import Batch, build_method, permutation
from rcmstr_fast.methods.permutation import (
    PermutationSettings,
    PermutedQuery,
    kept_frames,
    pairing_windows,
    pooling_windows,
)
from tests.methods.tiny import tiny_config


def test_windows_of_the_specification():
    assert pooling_windows(26, 4) == [(0, 7), (6, 13), (13, 20), (19, 26)]
    assert pairing_windows(26, 4, "stride") == [(0, 8), (6, 14), (12, 20), (18, 26)]
    assert sum(end - start for start, end in pairing_windows(26, 4, "stride")) == 32
    for pairing in ("stride", "pool"):
        assert pairing_windows(32, 4, pairing) == [(0, 8), (8, 16), (16, 24), (24, 32)]


@pytest.mark.parametrize("frames", [25, 26, 27, 32, 33])
def test_pooling_windows_are_adaptive_average_pooling(frames):
    x = torch.rand(2, 3, frames, dtype=torch.float64)
    ours = torch.stack([x[..., a:b].mean(-1) for a, b in pooling_windows(frames, 4)], dim=-1)
    torch.testing.assert_close(ours, F.adaptive_avg_pool1d(x, 4))


def frames_of(images: torch.Tensor, count: int) -> torch.Tensor:
    """A frame encoder that moves with its strip: mean colour of equal columns, [B, T, 3]."""
    return F.adaptive_avg_pool2d(images, (1, count)).squeeze(2).transpose(1, 2)


def test_direct_brings_every_frame_back():
    images = torch.rand(6, 3, 32, 128)
    method = PermutationSettings(num_patches=2, group_size=2)
    shuffled = PermutedQuery(images, torch.arange(6), 3, method, seed=1)
    assert not torch.equal(shuffled.images, images)
    pooled = shuffled.pool(frames_of(shuffled.images, 32))
    torch.testing.assert_close(pooled.frame, frames_of(images, 32))
    torch.testing.assert_close(pooled.word[:, 0], frames_of(images, 32).mean(dim=1))


def test_drop_boundary_leaves_out_the_frames_beside_the_cut():
    assert kept_frames(26, 2) == [t for t in range(26) if t not in (12, 13)]
    images = torch.rand(4, 3, 32, 104)
    method = PermutationSettings(num_patches=2, group_size=2, division="drop_boundary")
    shuffled = PermutedQuery(images, torch.arange(4), 0, method, seed=1)
    pooled = shuffled.pool(frames_of(shuffled.images, 26))
    plain = frames_of(images, 26)
    assert pooled.frame.shape[1] == 24
    torch.testing.assert_close(pooled.frame, plain[:, kept_frames(26, 2)])
    torch.testing.assert_close(pooled.subword[:, 1], plain[:, 6:12].mean(dim=1))


def test_drop_boundary_refuses_an_empty_subword():
    method = PermutationSettings(num_patches=13, group_size=1, division="drop_boundary", num_subwords=26)
    images = torch.rand(2, 3, 32, 104)
    shuffled = PermutedQuery(images, torch.arange(2), 0, method, seed=0)
    with pytest.raises(ConfigError, match="leaves no frame"):
        shuffled.pool(torch.rand(2, 26, 4))


def test_vertical_projection_cuts_where_there_is_no_ink():
    images = torch.rand(2, 3, 32, 100)
    images[0, :, :, 45] = 0.5
    images[1, :, :, 58] = 0.5
    assert permutation.find_cuts(images, 2)[:, 1].tolist() == [45.0, 58.0]
    rounded = images.bfloat16()
    assert torch.equal(permutation.find_cuts(rounded, 2), permutation.find_cuts(rounded.float(), 2))


def test_vertical_projection_returns_features_to_their_place():
    """On an image that is linear in x, stretched strips and stretched-back frames agree with the plain frames."""
    ramp = torch.linspace(-1, 1, 128).expand(4, 3, 32, 128).clone()
    noise = torch.zeros(4, 1, 32, 128)
    noise[:, :, ::2] = 0.2
    noise[:, :, :, 58:60] = 0
    images = ramp + noise
    method = PermutationSettings(num_patches=2, group_size=1, division="vertical_projection")
    shuffled = PermutedQuery(images, torch.arange(4), 0, method, seed=2)
    pooled = shuffled.pool(frames_of(shuffled.images, 32))
    error = (pooled.frame - frames_of(images, 32)).abs()
    assert error[:, 1:-1].max() < 0.12 and error.mean() < 0.02


def test_odd_batch_keeps_its_last_image():
    images = torch.rand(5, 3, 32, 100)
    shuffled = PermutedQuery(images, torch.arange(5), 0, PermutationSettings(), seed=0)
    torch.testing.assert_close(shuffled.images[4], images[4])
    restored = ops.restore_frames(torch.rand(5, 26, 2), shuffled.order, num_patches=2, group_size=2)
    assert restored.shape == (5, 26, 2)


@pytest.mark.parametrize("division", ["direct", "drop_boundary", "vertical_projection"])
def test_permuted_images_that_come_along_change_nothing(division):
    config = tiny_config("resnet29", 6, name="rclstr", division=division)
    shape = (config.model.height, config.model.image_width)
    pictures = torch.randint(0, 256, (6, *shape, 3), dtype=torch.uint8)
    index = torch.arange(6) + 40
    order = permutation.permuted_order(index, 2, config.method, config.seed)
    views = ops.augment_views(pictures, seed=0, epoch=2, index=index, num_views=2, size=shape, order=order)
    losses = []
    for permuted, drawn in ((views[2], order), (views[2], None), (None, None)):
        method = build_method(config).train()
        shown = {"query": views[0], "key": views[1]} | ({} if permuted is None else {"permuted": permuted})
        losses.append(method(Batch(shown, index, 2, {} if drawn is None else {"order": drawn})).loss)
    assert torch.equal(losses[0], losses[2]) and torch.equal(losses[1], losses[2])
    if division == "vertical_projection":
        return
    shuffled = PermutedQuery(views[0], index, 2, config.method, config.seed)
    assert torch.equal(shuffled.images, views[2])
