"""Enriched relations (paper section III-B1): the permuted query and the undoing of its permutation.

`direct` cuts at equal widths. `drop_boundary` leaves out the frames on both sides of an inner cut.
`vertical_projection` moves each inner cut to the column with the least ink near it; the strips between
the moved cuts are stretched to equal width, so that shuffling stays a copy of whole strips, and the
frames are stretched back afterwards.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rcmstr_fast.config import ConfigError
from rcmstr_fast.fields import number
from rcmstr_fast.methods.parts.windows import pooling_windows
from rcmstr_fast.ops.hierarchical_pool import HierarchicalFeatures, hierarchical_pool
from rcmstr_fast.ops.permutation import draw_order, permute_strips, restore_frames


@dataclass
class PermutationSettings:
    """Fields of the permutation and of the pooling that undoes it.

    Attributes:
        division: where images are cut for the permutation.
        num_patches: strips an image (N).
        group_size: images whose strips are shuffled together (M).
        shared_permutation: one permutation for all groups of a batch; null: by preset (rclstr_code has one).
        num_subwords: subwords an image (S).
    """

    division: Literal["direct", "drop_boundary", "vertical_projection"] = "direct"
    num_patches: int = number(2, low=1)
    group_size: int = number(2, low=1)
    shared_permutation: bool | None = None
    num_subwords: int = number(4, low=1)


def pairing_windows(frames: int, num_subwords: int, pairing: str) -> list[tuple[int, int]]:
    """Frames that pair with each subword in loss_f2s: `stride` or `pool` windows."""
    if pairing == "pool":
        return pooling_windows(frames, num_subwords)
    stride = frames // num_subwords
    width = frames - (num_subwords - 1) * stride
    return [(s * stride, s * stride + width) for s in range(num_subwords)]


def kept_frames(frames: int, num_patches: int) -> list[int]:
    """Frames that do not touch an inner cut, for division `drop_boundary`."""
    strip = frames // num_patches
    cut = {n * strip + side for n in range(1, num_patches) for side in (-1, 0)}
    return [t for t in range(frames) if t not in cut]


def _pool_kept(frames: Tensor, num_subwords: int, num_patches: int) -> HierarchicalFeatures:
    """Hierarchical pooling over the kept frames alone; the frame level has fewer rows an image."""
    count = frames.shape[1]
    kept = kept_frames(count, num_patches)
    windows = pooling_windows(count, num_subwords)
    for s, (start, end) in enumerate(windows):
        if not any(start <= t < end for t in kept):
            raise ConfigError(
                f"method.division=drop_boundary leaves no frame of {count} in subword {s}; use fewer num_patches"
            )
    rows = torch.cat([frames[:, a:b] for a, b in _runs(kept, 0, count)], dim=1)
    subwords = []
    for start, end in windows:  # slices: a list of numbers as an index would make the device wait for the host
        subwords.append(torch.cat([frames[:, a:b] for a, b in _runs(kept, start, end)], dim=1).mean(dim=1))
    return HierarchicalFeatures(rows, torch.stack(subwords, dim=1), rows.mean(dim=1, keepdim=True))


def _runs(kept: list[int], start: int, end: int) -> list[tuple[int, int]]:
    """The kept frames in [start, end) as runs `[a, b)` without a gap."""
    inside = [t for t in kept if start <= t < end]
    firsts = [t for t in inside if t - 1 not in inside]
    lasts = [t for t in inside if t + 1 not in inside]
    return [(a, b + 1) for a, b in zip(firsts, lasts, strict=True)]


def find_cuts(images: Tensor, num_patches: int) -> Tensor:
    """Columns with the least ink near each uniform cut.

    Args:
        images: [B, 3, H, W]; ink of a column is the standard deviation of its grey values.
        num_patches: N; each inner cut moves by less than a quarter of a strip.
    Returns:
        [B, N + 1] float32 cut positions in pixels, first 0, last W.
    """
    batch, width = images.shape[0], images.shape[-1]
    ink = images.float().mean(dim=1).std(dim=1)
    reach = width // num_patches // 4
    cuts = [ink.new_zeros(batch)]
    for n in range(1, num_patches):
        centre = n * width // num_patches
        window = ink[:, centre - reach : centre + reach + 1]
        cuts.append((window.argmin(dim=1) + centre - reach).to(ink.dtype))
    return torch.stack([*cuts, ink.new_full((batch,), width)], dim=1)


def _resample(x: Tensor, position: Tensor) -> Tensor:
    """Linear interpolation of the last axis: x `[B, .., L]` at `position [B, L']` (index units, clamped)."""
    last = x.shape[-1] - 1
    position = position.clamp(0, last)
    low = position.floor().clamp(max=max(last - 1, 0)).long()
    part = (position - low).to(x.dtype)
    shape = [x.shape[0]] + [1] * (x.dim() - 2) + [position.shape[1]]
    expand = [*x.shape[:-1], position.shape[1]]
    left = x.gather(-1, low.view(shape).expand(expand))
    right = x.gather(-1, (low + 1).clamp(max=last).view(shape).expand(expand))
    return left + (right - left) * part.view(shape)


def _stretch(cuts: Tensor, length: int, inverse: bool) -> Tensor:
    """Where `length` equal cells read from: uniform strips to cut strips, or back (index units)."""
    uniform = torch.linspace(0, 1, cuts.shape[1], device=cuts.device, dtype=cuts.dtype).expand_as(cuts)
    moved = cuts / cuts[:, -1:]
    source, target = (moved, uniform) if inverse else (uniform, moved)
    centre = ((torch.arange(length, device=cuts.device, dtype=cuts.dtype) + 0.5) / length).expand(len(cuts), -1)
    strip = (torch.searchsorted(source.contiguous(), centre.contiguous(), right=True) - 1).clamp(0, cuts.shape[1] - 2)
    start, end = source.gather(1, strip), source.gather(1, strip + 1)
    low, high = target.gather(1, strip), target.gather(1, strip + 1)
    return (low + (centre - start) / (end - start) * (high - low)) * length - 0.5


def permuted_order(index: Tensor, epoch: int | Tensor, method: PermutationSettings, seed: int) -> Tensor:
    """The order [B, N] in which a batch of slots `index` [B] int64 is permuted; as of `ops.draw_order`."""
    return draw_order(
        index,
        seed=seed,
        epoch=epoch,
        num_patches=method.num_patches,
        group_size=method.group_size,
        shared=bool(method.shared_permutation),
    )


class PermutedQuery:
    """Makes the permuted images of a batch and brings their frames back into place.

    Args:
        images: [B, 3, H, W]; the query view.
        index: [B] int64.
        epoch: the epoch.
        method: division, num_patches, group_size, shared_permutation.
        seed: seed of the run.
        permuted: like images, in `permuted_order`; where they have been made already (not for moved cuts).
        order: [B, N] int64; `permuted_order`, where it has been drawn already.
    """

    def __init__(
        self,
        images: Tensor,
        index: Tensor,
        epoch: int | Tensor,
        method: PermutationSettings,
        seed: int,
        permuted: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        self.method = method
        self._shape: dict[str, Any] = {"num_patches": method.num_patches, "group_size": method.group_size}
        self.order = permuted_order(index, epoch, method, seed) if order is None else order
        self._cuts = None
        if method.division == "vertical_projection":
            self._cuts = find_cuts(images, method.num_patches)
            images = _resample(images, _stretch(self._cuts, images.shape[-1], inverse=False))
            permuted = None
        self.images = permuted if permuted is not None else permute_strips(images, self.order, **self._shape)

    def pool(self, frames: Tensor) -> HierarchicalFeatures:
        """Projected frames `[B, T, P]` of the permuted images to features in the images' own order."""
        if self.method.division == "direct":
            return hierarchical_pool(frames, self.method.num_subwords, order=self.order)
        frames = restore_frames(frames, self.order, **self._shape)
        if self._cuts is None:
            return _pool_kept(frames, self.method.num_subwords, self.method.num_patches)
        back = _stretch(self._cuts, frames.shape[1], inverse=True)
        return hierarchical_pool(_resample(frames.transpose(1, 2), back).transpose(1, 2), self.method.num_subwords)
