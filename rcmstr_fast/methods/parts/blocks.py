"""Masks of rectangles of tokens, as BEiT and iBOT have them; drawn by the loader's threads, since they take many steps."""

import math

import torch
from torch import Tensor

from rcmstr_fast import random

#: Rectangles that are tried one after the other.
ATTEMPTS = 32
#: Longest rectangle: height by width, and the reverse.
ASPECT = 1 / 0.3


def hidden_tokens(grid: tuple[int, int], ratio: float) -> int:
    """Largest number of hidden tokens, at least 1."""
    return max(1, int(ratio * grid[0] * grid[1]))


def block_masks(index: Tensor, *, seed: int, epoch: int, grid: tuple[int, int], ratio: float, views: int = 2) -> Tensor:
    """Rectangles until a share of the tokens is hidden.

    A rectangle has an area between (shorter side of the grid / 3)^2 and what is still to hide, and a logarithmically
    drawn aspect between 0.3 and 1 / 0.3. It is left out where it would hide nothing new or too much.

    Args:
        index: [B] int64 slots.
        seed: of the run.
        epoch: 0-based.
        grid: tokens (rows, columns).
        ratio: share of the tokens to hide; never more are hidden, and mostly a few less.
        views: masks an image.
    Returns:
        [B, views, rows, columns] bool, True means hidden.
    """
    rows, columns = grid
    target = hidden_tokens(grid, ratio)
    least = min(max(1, (min(grid) // 3) ** 2), target)
    words = random.words(index, views * ATTEMPTS * 4, seed=seed, stream=random.MASK, epoch=epoch)
    drawn = random.uniform(words).double().view(len(index), views, ATTEMPTS, 4)
    y, x = torch.arange(rows)[:, None], torch.arange(columns)
    hidden = torch.zeros(len(index), views, rows, columns, dtype=torch.bool)
    for area, aspect, down, right in drawn.permute(2, 3, 0, 1).unbind():
        left = target - hidden.sum((2, 3))
        size = least + area * (left - least).clamp(min=0)
        stretch = torch.exp((2 * aspect - 1) * math.log(ASPECT))
        height = (size * stretch).sqrt().round().clamp(1, rows)
        width = (size / stretch).sqrt().round().clamp(1, columns)
        top, start = (
            (free + 1).mul(u).floor()[..., None, None] for free, u in ((rows - height, down), (columns - width, right))
        )
        block = (y >= top) & (y < top + height[..., None, None]) & (x >= start) & (x < start + width[..., None, None])
        fresh = (block & ~hidden).sum((2, 3))
        hidden |= block & ((fresh > 0) & (fresh <= left))[..., None, None]
    return hidden
