"""Random masks for masked image modelling."""

from torch import Tensor

from rcmstr_fast.ops import checks
from rcmstr_fast.ops.dispatch import operation, register_triton
from rcmstr_fast.ops.draw_masks import reference, triton
from rcmstr_fast.ops.draw_masks.reference import BLOCK_WIDTH, unit_size
from rcmstr_fast.ops.draw_masks.reference import Masks as Masks

UNITS = ("token", "lattice", "stage3", "column")

_draw_masks = operation("draw_masks", reference.draw_masks)
register_triton(_draw_masks, triton.draw_masks, triton.reasons)
_NAME = "draw_masks"


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
        backend: None (automatic), "reference" or "triton".
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
