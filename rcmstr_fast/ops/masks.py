"""Random masks for masked image modelling."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast import env, random
from rcmstr_fast.ops import checks, reference, triton_backend
from rcmstr_fast.ops.dispatch import operation, register
from rcmstr_fast.ops.reference import Masks
from rcmstr_fast.ops.reference.masks import BLOCK_WIDTH, unit_size, visible_share

UNITS = ("token", "lattice", "stage3", "column")

_draw_masks = operation("draw_masks", reference.draw_masks)
_NAME = "draw_masks"
#: Cells that one program of the kernel ranks.
_MOST_CELLS = 1024


@torch.library.custom_op("rcmstr_fast::draw_masks", mutates_args=())
def _draw(
    index: Tensor, epoch: Tensor, seed: str, cells: list[int], unit: list[int], hidden: int, num_blocks: int,
    block_cells: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Grid and pixels; the 64-bit seed as text, since an operator's int is signed."""
    from rcmstr_fast.kernels.draw_masks import draw_masks as launch

    return launch(
        index, epoch, seed=int(seed), stream=random.MASK, cells=(cells[0], cells[1]), unit=(unit[0], unit[1]),
        hidden=hidden, num_blocks=num_blocks, block_cells=block_cells,
    )  # fmt: skip


@_draw.register_fake
def _(index, epoch, seed, cells, unit, hidden, num_blocks, block_cells):  # type: ignore[no-untyped-def]
    grid = index.new_empty(index.shape[0], *cells, dtype=torch.bool)
    return grid, index.new_empty(index.shape[0], 1, cells[0] * unit[0], cells[1] * unit[1], dtype=torch.bool)


def _on_triton(
    index: Tensor, *, seed: int, epoch: int | Tensor, size: tuple[int, int], unit: str, mask_ratio: float,
    num_blocks: int,
) -> Masks:  # fmt: skip
    if not isinstance(epoch, Tensor):
        epoch = torch.full((), epoch, dtype=torch.int64, device=index.device)
    cell = unit_size(unit, size[0])
    cells = size[0] // cell[0], size[1] // cell[1]
    hidden = int(mask_ratio * cells[0] * cells[1])
    block = BLOCK_WIDTH // cell[1]
    grid, pixels = _draw(index, epoch, str(seed), cells, cell, hidden, num_blocks, block)
    return Masks(grid, pixels, visible_share(cells[0] * cells[1], hidden, cells[1], num_blocks, block))


def _reasons(index: Tensor, *, size: tuple[int, int], unit: str, **_: Any) -> list[str]:
    device = "cpu" if env.triton_interpreter() else "cuda"
    found = [] if index.device.type == device else [f"index must be on {device}, got {index.device}"]
    height, width = unit_size(unit, size[0])
    cells = (size[0] // height) * (size[1] // width)
    return found + ([f"at most {_MOST_CELLS} cells, got {cells}"] if cells > _MOST_CELLS else [])


register(
    _draw_masks,
    "triton",
    _on_triton,
    unsupported_reasons=_reasons,
    available=triton_backend.reasons,
    avoid=triton_backend.avoid_on_cpu,
)


def draw_masks(
    index: Tensor,
    *,
    seed: int,
    epoch: int | Tensor,
    size: tuple[int, int],
    unit: str,
    mask_ratio: float,
    num_blocks: int,
    backend: str | None = None,
) -> Masks:
    """Hide exactly int(mask_ratio * cells) random cells, then also full-height blocks 16 pixels wide.

    A pure function of (seed, epoch, index). The number of hidden cells is not re-balanced after the blocks.

    Args:
        index: [B] int64; slots of the images.
        seed: 64-bit key of the run.
        epoch: 0 and up; int, or 0-d int64 tensor on the device of `index`.
        size: (H, W) of the images in pixels, multiples of the unit.
        unit: cell in pixels: "token" and "lattice" 4x4, "stage3" 8x4, "column" Hx4.
        mask_ratio: 0 to 1; share of the cells hidden before the blocks.
        num_blocks: 0 and up; blocks start at uniform cell columns, independently.
        backend: None (automatic), "reference", "cpp", "triton" or "cuda".
    Returns:
        `grid` [B, gh, gw] bool (True: hidden), `pixels` [B, 1, H, W] bool, the grid blown up by the unit, and
        `visible`, the expected share of visible cells, a number of the host.
    Raises:
        TypeError: index is not int64.
        ValueError: unknown unit, size not a multiple of it, ratio or number of blocks out of range.
    """
    checks.check_tensor(_NAME, "index", index, ("B",), "int64")
    checks.check_choice(_NAME, "unit", unit, UNITS)
    height, width = unit_size(unit, size[0])
    if min(size) < 1 or size[0] % height or size[1] % width:
        raise ValueError(f"{_NAME}: size must be a multiple of {height}x{width} (unit {unit}), got {size[0]}x{size[1]}")
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"{_NAME}: mask_ratio must be in 0..1, got {mask_ratio}")
    if num_blocks < 0 or (num_blocks and size[1] < BLOCK_WIDTH):
        raise ValueError(
            f"{_NAME}: num_blocks must be 0 or more, and 0 below a width of {BLOCK_WIDTH}, "
            f"got {num_blocks} at width {size[1]}"
        )
    return _draw_masks(
        index,
        seed=seed,
        epoch=epoch,
        size=size,
        unit=unit,
        mask_ratio=mask_ratio,
        num_blocks=num_blocks,
        backend=backend,
    )
