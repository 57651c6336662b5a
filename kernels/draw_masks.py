"""Random masks, bit for bit those of the reference: the cells with the lowest random words, and blocks of full height.

There is one program for each image. Philox4x32-10 gives each cell a 32-bit word; the cells with the lowest words are
hidden, as many as asked for, ties in the order of the cells: a cell's rank is the number of cells before it, counted
without a sort. The words after those of the cells place the blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import runtime


def chunk(cells: int) -> int:
    """Words that the ranks are compared with at a time: more than 512 ranks beside 32 words spill."""
    return 32 if cells <= 512 else 16


def warps(cells: int) -> int:
    """Warps of a program: more than 256 ranks beside a chunk of words spill in four."""
    return 4 if cells <= 256 else 8 if cells <= 512 else 16


@triton.jit
def _words(i, c1, c2, c3, k0, k1):
    """Words i of the sequence of one image; four words a counter."""
    c0 = (i // 4).to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox_impl(c0, zero + c1, zero + c2, zero + c3, zero + k0, zero + k1, 10)
    part = i % 4
    return tl.where(part == 0, w0, tl.where(part == 1, w1, tl.where(part == 2, w2, w3)))


@triton.jit
def _draw_masks_kernel(
    index_ptr,
    epoch_ptr,
    seed_ptr,
    grid_ptr,
    pixels_ptr,
    hidden,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT_H: tl.constexpr,
    UNIT_W: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Hidden cells and pixels of one image (grid: images). Integer arithmetic only; writes cells + pixels bytes."""
    CELLS: tl.constexpr = ROWS * COLUMNS
    image = tl.program_id(0).to(tl.int64)
    index = tl.load(index_ptr + image)
    c1 = (index & 0xFFFFFFFF).to(tl.uint32)
    c2 = (((index >> 32) & 0xFFFF) | (STREAM << 16)).to(tl.uint32)
    c3 = tl.load(epoch_ptr).to(tl.uint32)
    seed = tl.load(seed_ptr)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    cell = tl.arange(0, BLOCK)
    mine = _words(cell, c1, c2, c3, k0, k1)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, CELLS, CHUNK):
        other = start + tl.arange(0, CHUNK)
        word = _words(other, c1, c2, c3, k0, k1)
        lower = word[None, :] < mine[:, None]
        tied = (word[None, :] == mine[:, None]) & (other[None, :] < cell[:, None])
        rank += tl.sum(((lower | tied) & (other < CELLS)[None, :]).to(tl.int32), axis=1)
    covered = rank < hidden
    column = cell % COLUMNS
    for b in range(BLOCKS):
        word = _words(CELLS + b + tl.zeros((BLOCK,), tl.int32), c1, c2, c3, k0, k1)
        first = ((word.to(tl.int64) * (COLUMNS - BLOCK_CELLS + 1)) >> 32).to(tl.int32)
        covered = covered | ((column >= first) & (column < first + BLOCK_CELLS))
    value = covered.to(tl.uint8)
    inside = cell < CELLS
    tl.store(grid_ptr + image * CELLS + cell, value, mask=inside)
    corner = image * (CELLS * UNIT_H * UNIT_W) + (cell // COLUMNS) * (UNIT_H * COLUMNS * UNIT_W) + column * UNIT_W
    for y in range(UNIT_H):
        for x in tl.static_range(UNIT_W):
            tl.store(pixels_ptr + corner + y * (COLUMNS * UNIT_W) + x, value, mask=inside)


def draw_masks(
    index: Tensor,
    epoch: Tensor,
    *,
    seed: int,
    stream: int,
    cells: tuple[int, int],
    unit: tuple[int, int],
    hidden: int,
    num_blocks: int,
    block_cells: int,
) -> tuple[Tensor, Tensor]:
    """Hidden cells and pixels of `ops.draw_masks`.

    Args:
        index: [B] int64.
        epoch: 0-d int64 on the device of `index`.
        seed: 64-bit key.
        stream: of random.py.
        cells: rows and columns of the grid, at most 1024 together.
        unit: pixels of a cell.
        hidden: cells hidden before the blocks.
        num_blocks: full-height blocks.
        block_cells: columns a block.
    Returns:
        [B, rows, columns] and [B, 1, H, W] bool.
    """
    batch, (rows, columns) = index.shape[0], cells
    grid = torch.empty(batch, rows, columns, dtype=torch.bool, device=index.device)
    pixels = torch.empty(batch, 1, rows * unit[0], columns * unit[1], dtype=torch.bool, device=index.device)
    key = seed & 0xFFFFFFFFFFFFFFFF
    seeds = torch.full((1,), key - (1 << 64 if key >= 1 << 63 else 0), dtype=torch.int64, device=index.device)
    if batch:
        with runtime.on_device(index.device):
            _draw_masks_kernel[(batch,)](
                index.contiguous(),
                epoch,
                seeds,
                grid.view(torch.uint8),
                pixels.view(torch.uint8),
                hidden,
                ROWS=rows,
                COLUMNS=columns,
                UNIT_H=unit[0],
                UNIT_W=unit[1],
                BLOCKS=num_blocks,
                BLOCK_CELLS=block_cells,
                STREAM=stream,
                CHUNK=chunk(rows * columns),
                BLOCK=triton.next_power_of_2(rows * columns),
                num_warps=warps(rows * columns),
            )
    return grid, pixels
