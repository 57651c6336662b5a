"""Random masks of cells plus full-height blocks in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from rcmstr_fast import random

BLOCK_WIDTH = 16  # pixels


class Masks(NamedTuple):
    """Hidden cells `grid` [B, gh, gw] bool, hidden pixels `pixels` [B, 1, H, W] bool, and what the host knows of them.

    `visible` is the expected share of visible cells: it chooses how a masked pass is computed without asking the
    device.
    """

    grid: Tensor
    pixels: Tensor
    visible: float | None = None


def visible_share(cells: int, hidden: int, columns: int, num_blocks: int, block_cells: int) -> float:
    """Expected share of visible cells: those outside the hidden ones and outside every block, on average."""
    return (1 - hidden / cells) * (1 - block_cells / columns) ** num_blocks


def unit_size(unit: str, height: int) -> tuple[int, int]:
    """(height, width) in pixels of one mask cell."""
    return {"token": (4, 4), "lattice": (4, 4), "stage3": (8, 4), "column": (height, 4)}[unit]


def draw_masks(
    index: Tensor,
    *,
    seed: int,
    epoch: int | Tensor,
    size: tuple[int, int],
    unit: str,
    mask_ratio: float,
    num_blocks: int,
) -> Masks:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.draw_masks`."""
    unit_height, unit_width = unit_size(unit, size[0])
    rows, columns = size[0] // unit_height, size[1] // unit_width
    cells, width = rows * columns, BLOCK_WIDTH // unit_width
    words = random.words(index, cells + num_blocks, seed=seed, stream=random.MASK, epoch=epoch)
    count = int(mask_ratio * cells)
    hidden = random.permutation(words[:, :cells])[:, :count]
    grid = torch.zeros_like(words[:, :cells], dtype=torch.bool).scatter_(1, hidden, True).view(-1, rows, columns)
    start = random.integers(words[:, cells:], columns - width + 1)[:, :, None]
    column = torch.arange(columns, device=index.device)
    block = ((column >= start) & (column < start + width)).any(dim=1)
    grid = grid | block[:, None, :]
    pixels = grid.repeat_interleave(unit_height, dim=1).repeat_interleave(unit_width, dim=2)
    return Masks(grid, pixels[:, None], visible_share(cells, count, columns, num_blocks, width))
