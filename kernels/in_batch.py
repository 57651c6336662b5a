"""In-batch InfoNCE and its two gradients without the M x K matrix.

The rows have length 1, so every similarity s, over the temperature t, lies in [-1/t, 1/t], and exp((s - 1) / t) needs
no running maximum. In the statistics pass each program has a tile of rows and sums these exponentials over all
candidates.
The gradients compute the similarities again, in two passes: in one a program has a tile of rows and sums softmax x
candidates, in the other it has a tile of candidates and sums softmax x rows. So nothing is added atomically, and the
result repeats bit for bit. Operands are float16, sums float32; the softmax lies in [0, 1]
and its products are scaled after the sum, so float16 loses nothing but what lies below 6e-8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import runtime
from rcmstr_fast.kernels.queue_losses.tiles import Tile

#: Widths of a row.
WIDTHS = (64, 128, 256)
#: (family of `architectures`, D) -> tile; `_DEFAULT` where there is none.
TILES = {
    (80, 256): Tile(64, 64, 8, 2, 1),
    (86, 256): Tile(64, 32, 4, 2, 1),
    (90, 64): Tile(128, 64, 8, 3, 1),  # with four warps ptxas serialises the products of the candidates' gradient
}
_DEFAULT = Tile(64, 64, 4, 3, 1)
LOG2_E = 1.4426950408889634


def tile(family: int, width: int) -> Tile:
    """The tile of all three kernels for rows of `width` columns: block_m rows, block_n candidates."""
    return TILES.get((family, width), _DEFAULT)


@triton.jit
def _rows(ptr, places, count, D: tl.constexpr):
    """Rows `places` of a [count, D] array, 0 beyond its end."""
    offsets = places.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(ptr + offsets, mask=(places < count)[:, None], other=0.0)


@triton.jit
def _exponentials(query, candidates, skip, places, K, scale):
    """exp((q . c - 1) / t) [rows, candidates]; 0 beyond the last candidate and at the one that a row leaves out."""
    similarity = tl.dot(query, tl.trans(candidates))
    kept = (places < K)[None, :] & (places[None, :] != skip[:, None])
    return tl.where(kept, tl.exp2((similarity - 1.0) * scale), 0.0)


@triton.jit
def _stats_kernel(
    query_ptr,
    candidates_ptr,
    positive_ptr,
    skip_ptr,
    total_ptr,
    loss_ptr,
    M,
    K,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum of the exponentials and loss of each row (grid: tiles of rows).

    Note: reads (M / BLOCK_M) K D 2 bytes through the L2 cache, M K D multiply-adds.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = _rows(query_ptr, rows, M, D)
    skip = tl.load(skip_ptr + rows, mask=rows < M, other=-1).to(tl.int32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, K, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        candidates = _rows(candidates_ptr, places, K, D)
        total += tl.sum(_exponentials(query, candidates, skip, places, K, scale), axis=1)
    positive = tl.load(positive_ptr + rows, mask=rows < M, other=0)
    own = tl.sum(query.to(tl.float32) * _rows(candidates_ptr, positive, K, D).to(tl.float32), axis=1)
    loss = tl.log(total) - (own - 1.0) * (scale * 0.6931471805599453)
    tl.store(total_ptr + rows, total, mask=rows < M)
    tl.store(loss_ptr + rows, loss, mask=rows < M)


@triton.jit
def _grad_query_kernel(
    query_ptr,
    candidates_ptr,
    positive_ptr,
    skip_ptr,
    total_ptr,
    grad_ptr,
    M,
    K,
    scale,
    share,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """share (sum over candidates of softmax x candidate - positive) of each row (grid: tiles of rows)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = _rows(query_ptr, rows, M, D)
    skip = tl.load(skip_ptr + rows, mask=rows < M, other=-1).to(tl.int32)
    inverse = 1.0 / tl.load(total_ptr + rows, mask=rows < M, other=1.0)
    grad = tl.zeros([BLOCK_M, D], tl.float32)
    for first in range(0, K, BLOCK_N):
        places = first + tl.arange(0, BLOCK_N)
        candidates = _rows(candidates_ptr, places, K, D)
        weight = _exponentials(query, candidates, skip, places, K, scale) * inverse[:, None]
        grad = tl.dot(weight.to(tl.float16), candidates, grad)
    positive = tl.load(positive_ptr + rows, mask=rows < M, other=0)
    grad = (grad - _rows(candidates_ptr, positive, K, D).to(tl.float32)) * share
    offsets = rows.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(grad_ptr + offsets, grad, mask=(rows < M)[:, None])


@triton.jit
def _grad_candidates_kernel(
    query_ptr,
    candidates_ptr,
    positive_ptr,
    skip_ptr,
    total_ptr,
    grad_ptr,
    M,
    K,
    scale,
    share,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """share x sum over rows of (softmax - 1 at the positive) x row, of each candidate (grid: tiles of candidates)."""
    places = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    candidates = _rows(candidates_ptr, places, K, D)
    grad = tl.zeros([BLOCK_N, D], tl.float32)
    for first in range(0, M, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        query = _rows(query_ptr, rows, M, D)
        skip = tl.load(skip_ptr + rows, mask=rows < M, other=-1).to(tl.int32)
        positive = tl.load(positive_ptr + rows, mask=rows < M, other=-1).to(tl.int32)
        inverse = 1.0 / tl.load(total_ptr + rows, mask=rows < M, other=float("inf"))
        weight = _exponentials(query, candidates, skip, places, K, scale) * inverse[:, None]
        weight = tl.where(places[None, :] == positive[:, None], weight - 1.0, weight)
        grad = tl.dot(tl.trans(weight).to(tl.float16), query, grad)
    offsets = places.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(grad_ptr + offsets, grad * share, mask=(places < K)[:, None])


def info_nce(
    query: Tensor, candidates: Tensor, positive: Tensor, skip: Tensor | None, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of `ops.info_nce`.

    Args:
        query: [M, D] float16, bfloat16 or float32; D is 64, 128 or 256.
        candidates: [K, D].
        positive: [M] int64.
        skip: [M] int64 or None.
        temperature: t.
        with_gradient: False skips the gradients.
    Returns:
        The loss 0-d and the gradients [M, D] and [K, D] (empty without), float32.
    """
    (count, width), number = query.shape, len(candidates)
    query, candidates = query.half().contiguous(), candidates.half().contiguous()
    skip = torch.full_like(positive, -1) if skip is None else skip.contiguous()
    positive = positive.contiguous()
    total, losses = (torch.empty(count, dtype=torch.float32, device=query.device) for _ in range(2))
    sizes = (count if with_gradient else 0, number if with_gradient else 0)
    grads = [torch.empty(size, width, dtype=torch.float32, device=query.device) for size in sizes]
    scale, share = LOG2_E / temperature, 1.0 / (count * temperature)
    of = tile(runtime.architecture(query.device), width)
    blocks = {"D": width, "BLOCK_M": of.block_m, "BLOCK_N": of.block_n}
    options = {**blocks, "num_warps": of.num_warps, "num_stages": of.num_stages}
    operands = (query, candidates, positive, skip, total)
    with runtime.on_device(query.device):
        _stats_kernel[(triton.cdiv(count, of.block_m),)](*operands, losses, count, number, scale, **options)
        if with_gradient:
            _grad_query_kernel[(triton.cdiv(count, of.block_m),)](
                *operands, grads[0], count, number, scale, share, **options
            )
            grid = (triton.cdiv(number, of.block_n),)
            _grad_candidates_kernel[grid](*operands, grads[1], count, number, scale, share, **options)
    return losses.mean(), grads[0], grads[1]
