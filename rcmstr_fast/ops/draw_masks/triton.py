"""Triton backend of `draw_masks` as a custom operator."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast import random
from rcmstr_fast.ops import triton_backend
from rcmstr_fast.ops.draw_masks.reference import BLOCK_WIDTH, Masks, unit_size, visible_share

#: Cells that one program of the kernel ranks.
_MOST_CELLS = 1024


@torch.library.custom_op("rcmstr_fast::draw_masks", mutates_args=())
def _draw(
    index: Tensor,
    epoch: Tensor,
    seed: str,
    cells: list[int],
    unit: list[int],
    hidden: int,
    num_blocks: int,
    block_cells: int,
) -> tuple[Tensor, Tensor]:
    """Grid and pixels; the 64-bit seed as text, since an operator's int is signed."""
    from rcmstr_fast.kernels.draw_masks import draw_masks as launch

    return launch(
        index,
        epoch,
        seed=int(seed),
        stream=random.MASK,
        cells=(cells[0], cells[1]),
        unit=(unit[0], unit[1]),
        hidden=hidden,
        num_blocks=num_blocks,
        block_cells=block_cells,
    )


@_draw.register_fake
def _(index, epoch, seed, cells, unit, hidden, num_blocks, block_cells):
    grid = index.new_empty(index.shape[0], *cells, dtype=torch.bool)
    return grid, index.new_empty(index.shape[0], 1, cells[0] * unit[0], cells[1] * unit[1], dtype=torch.bool)


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
    """The public operation on the kernel."""
    if not isinstance(epoch, Tensor):
        epoch = torch.full((), epoch, dtype=torch.int64, device=index.device)
    cell = unit_size(unit, size[0])
    cells = size[0] // cell[0], size[1] // cell[1]
    hidden = int(mask_ratio * cells[0] * cells[1])
    block = BLOCK_WIDTH // cell[1]
    grid, pixels = _draw(index, epoch, str(seed), cells, cell, hidden, num_blocks, block)
    return Masks(grid, pixels, visible_share(cells[0] * cells[1], hidden, cells[1], num_blocks, block))


def reasons(index: Tensor, *, size: tuple[int, int], unit: str, **_: Any) -> list[str]:
    """Why the kernel cannot run the call."""
    device = "cpu" if triton_backend.interpreted() else "cuda"
    found = [] if index.device.type == device else [f"index must be on {device}, got {index.device}"]
    height, width = unit_size(unit, size[0])
    cells = (size[0] // height) * (size[1] // width)
    return found + ([f"at most {_MOST_CELLS} cells, got {cells}"] if cells > _MOST_CELLS else [])
