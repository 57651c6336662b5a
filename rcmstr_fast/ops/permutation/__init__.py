"""Enriched relations: vertical strips shuffled inside groups of images, frames put back afterwards."""

import torch
from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.ops import checks
from rcmstr_fast.ops.dispatch import only_reference
from rcmstr_fast.ops.permutation import reference


def check_order(op: str, order: Tensor, group_size: int) -> None:
    """Debug check (synchronises): a permutation of the strips of every group of `group_size` images."""
    flat, size = order.flatten(), group_size * order.shape[1]
    place = torch.arange(flat.numel(), device=flat.device)
    if not torch.equal(flat.sort().values, place) or not torch.equal(flat // size, place // size):
        raise ValueError(f"{op}: order must permute the strips of each group of {group_size} images")


def _check(op: str, name: str, tensor: Tensor, dim: int, order: Tensor, num_patches: int, group_size: int) -> None:
    """What permute_strips and restore_frames have in common; `dim` is the axis that is cut."""
    what = "the width" if dim == 3 else "the number of frames"
    checks.check_divides(op, "num_patches", num_patches, what, tensor.shape[dim])
    checks.check_positive(op, group_size=group_size)
    checks.check_tensor(op, "order", order, (tensor.shape[0], num_patches), "int64", like=f"{name} and num_patches")
    checks.check_devices(op, **{name: tensor, "order": order})
    if env.debug():
        check_order(op, order, group_size)


def permute_strips(
    images: Tensor, order: Tensor, *, num_patches: int, group_size: int, backend: str | None = None
) -> Tensor:
    """Cut each image into equal vertical strips and show them in another order (paper section III-B1, enriched relations).

    Place n of image b shows strip `order[b, n] % N` of image `order[b, n] // N`.

    Args:
        images: [B, 3, H, W] any dtype, W % N == 0.
        order: [B, N] int64; source strip `image * N + strip` of each place, as from `draw_order`.
        num_patches: N, strips an image.
        group_size: M, images among which strips are exchanged (checked with RCMSTR_FAST_DEBUG=1).
        backend: None or "reference", the only one.
    Returns:
        [B, 3, H, W] like `images`, also in memory format.
    Raises:
        TypeError: order is not int64.
        ValueError: N does not divide W, shapes or devices disagree.
    """
    only_reference("permute_strips", backend)
    checks.check_tensor("permute_strips", "images", images, ("B", "C", "H", "W"), None)
    _check("permute_strips", "images", images, 3, order, num_patches, group_size)
    return reference.permute_strips(images, order, num_patches=num_patches, group_size=group_size)


def restore_frames(
    frames: Tensor, order: Tensor, *, num_patches: int, group_size: int, backend: str | None = None
) -> Tensor:
    """Put the frames of permuted images back: the inverse of `permute_strips` on frames.

    Args:
        frames: [B, T, C] floating point, T % N == 0; features of permuted images.
        order: [B, N] int64; the order the images were permuted with.
        num_patches: N.
        group_size: M (checked with RCMSTR_FAST_DEBUG=1).
        backend: None or "reference", the only one.
    Returns:
        [B, T, C]; strip n of image b holds the T / N frames of the place that showed it.
    Raises:
        TypeError: order is not int64 or frames not floating point.
        ValueError: N does not divide T, shapes or devices disagree.
    """
    only_reference("restore_frames", backend)
    checks.check_tensor("restore_frames", "frames", frames, ("B", "T", "C"))
    _check("restore_frames", "frames", frames, 1, order, num_patches, group_size)
    return reference.restore_frames(frames, order, num_patches=num_patches, group_size=group_size)


def draw_order(
    index: Tensor,
    *,
    seed: int,
    epoch: int | Tensor,
    num_patches: int,
    group_size: int,
    shared: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Draw a random permutation of the strips of each group of consecutive images.

    Args:
        index: [B] int64; slots of the images. The first of a group keys its permutation.
        seed: 64-bit key of the run.
        epoch: 0 and up; int, or 0-d int64 tensor on the device of `index`.
        num_patches: N, strips an image.
        group_size: M, images a group. An incomplete last group stays as it is.
        shared: one permutation, keyed by the first index of the batch, for all groups.
        backend: None or "reference", the only one.
    Returns:
        [B, N] int64: source strip `image * N + strip` (counted in the batch) of each place.
    Raises:
        TypeError: index is not int64.
        ValueError: index is not 1-D, N or M is below 1.
    """
    only_reference("draw_order", backend)
    checks.check_tensor("draw_order", "index", index, ("B",), "int64")
    checks.check_positive("draw_order", num_patches=num_patches, group_size=group_size)
    return reference.draw_order(
        index, seed=seed, epoch=epoch, num_patches=num_patches, group_size=group_size, shared=shared
    )
