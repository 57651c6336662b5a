"""Pooling to the levels, a linear layer a level and L2 normalisation, undoing a strip permutation on the way.

The rows of a level are windows of frames: a frame is a window of one, subword s of S covers the frames
floor(s T / S) .. ceil((s + 1) T / S), a word all T. One flat grid holds the row tiles of every level. A program
averages the windows of BLOCK_M rows for a block of channels in fp32, multiplies by the level's weight matrix (all D
columns, so that the norm stays in the program), and writes unit rows and 1 / norm; averages of subwords and words are
kept for backward.

Backward, with g the gradient of unit rows q of norm n: the gradient of the linear layer's output is (g - (g.q) q) / n.
One kernel writes it for every level, that of a frame where the frame came from; a second one multiplies, at every
frame, each level's gradient (over the length of its window) by the level's weights and adds: the transposes of product,
pooling and permutation at once. Weight and bias gradients are products of the same gradients with the kept averages.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import runtime
from rcmstr_fast.kernels.hierarchical_pool import _inverse

BLOCK_M = 32
BLOCK_K = 64
#: Columns of the gradient a step of the backward product.
BLOCK_D = 32
EPS = 1e-12


def warps(width: int) -> int:
    """Warps of the kernels that hold whole rows: a row tile of fp32 spills in four from D = 256 on."""
    return 8 if width > 128 else 4


@triton.jit
def _row(tile, rows_a, rows_b, rows_c, BLOCK_M: tl.constexpr):
    """Level (0 frame, 1 subword, 2 word), row in the level [BLOCK_M], rows of the level, first row of the level."""
    tiles_a, tiles_b = tl.cdiv(rows_a, BLOCK_M), tl.cdiv(rows_b, BLOCK_M)
    level = (tile >= tiles_a).to(tl.int32) + (tile >= tiles_a + tiles_b).to(tl.int32)
    start = tl.where(level == 0, 0, tl.where(level == 1, tiles_a, tiles_a + tiles_b))
    count = tl.where(level == 0, rows_a, tl.where(level == 1, rows_b, rows_c))
    first = tl.where(level == 0, 0, tl.where(level == 1, rows_a, rows_a + rows_b))
    return level, (tile - start) * BLOCK_M + tl.arange(0, BLOCK_M), count, first


@triton.jit
def _window(level, row, T: tl.constexpr, S: tl.constexpr):
    """Image, first frame and number of frames of each row of a level."""
    per_image = tl.where(level == 0, T, tl.where(level == 1, S, 1))
    image, s = row // per_image, row % per_image
    start = s * T // per_image
    return image, start, ((s + 1) * T + per_image - 1) // per_image - start


@triton.jit
def _source(place_ptr, image, t, live, T: tl.constexpr, STRIPS: tl.constexpr):
    """Row of the flat [B T] frames in which frame t of an image is found."""
    if STRIPS == 0:
        return image.to(tl.int64) * T + t
    else:
        STEP: tl.constexpr = T // STRIPS
        place = tl.load(place_ptr + image * STRIPS + t // STEP, mask=live, other=0)
        return place * STEP + t % STEP


@triton.jit
def _level_of(level, a, b, c):
    return tl.where(level == 0, a, tl.where(level == 1, b, c))


@triton.jit
def _project_levels_fwd_kernel(
    frames_ptr,
    place_ptr,
    weight_a_ptr,
    weight_b_ptr,
    weight_c_ptr,
    bias_a_ptr,
    bias_b_ptr,
    bias_c_ptr,
    rows_ptr,
    inverse_ptr,
    pooled_ptr,
    rows_a,
    rows_b,
    rows_c,
    C,
    D,
    T: tl.constexpr,
    S: tl.constexpr,
    STRIPS: tl.constexpr,
    EPS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Unit rows [R, D], 1 / norm [R], averages [R - rows_a, C] (grid: row tiles of all levels).

    Note: reads frames up to three times (twice from the L2 cache), weights once a program; fp32 sums. Bitwise
        repeatable.
    """
    level, row, count, first = _row(tl.program_id(0), rows_a, rows_b, rows_c, BLOCK_M)
    live = row < count
    image, start, length = _window(level, row, T, S)
    longest = tl.max(tl.where(live, length, 0), axis=0)
    weight_ptr = _level_of(level, weight_a_ptr, weight_b_ptr, weight_c_ptr)
    bias_ptr = _level_of(level, bias_a_ptr, bias_b_ptr, bias_c_ptr)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for k in range(0, C, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for i in range(longest):
            here = live & (i < length)
            source = _source(place_ptr, image, start + i, here, T, STRIPS)
            mask = here[:, None] & (c < C)[None, :]
            total += tl.load(frames_ptr + source[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = (total / length[:, None].to(tl.float32)).to(frames_ptr.dtype.element_ty)
        if level > 0:
            at = (first - rows_a + row).to(tl.int64)[:, None] * C + c[None, :]
            tl.store(pooled_ptr + at, mean, mask=live[:, None] & (c < C)[None, :])
        mask = (c < C)[:, None] & (d < D)[None, :]
        weight = tl.load(weight_ptr + d[None, :] * C + c[:, None], mask=mask, other=0.0)
        if UPCAST:
            mean = mean.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(mean, weight, acc, input_precision="ieee")
    acc += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(acc * acc, axis=1)), EPS, propagate_nan=tl.PropagateNan.ALL)
    at = (first + row).to(tl.int64)
    tl.store(inverse_ptr + at, inverse, mask=live)
    tl.store(rows_ptr + at[:, None] * D + d[None, :], acc * inverse[:, None], mask=live[:, None] & (d < D)[None, :])


@triton.jit
def _project_levels_rows_kernel(
    grad_ptr,
    rows_ptr,
    inverse_ptr,
    place_ptr,
    out_ptr,
    rows_a,
    rows_b,
    rows_c,
    D,
    T: tl.constexpr,
    S: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients [R, D] of the linear layers' outputs, those of frames where they came from (grid: all row tiles)."""
    level, row, count, first = _row(tl.program_id(0), rows_a, rows_b, rows_c, BLOCK_M)
    live = row < count
    d = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (d < D)[None, :]
    at = (first + row).to(tl.int64)
    here = at[:, None] * D + d[None, :]
    grad = tl.load(grad_ptr + here, mask=mask, other=0.0).to(tl.float32)
    unit = tl.load(rows_ptr + here, mask=mask, other=0.0)
    inverse = tl.load(inverse_ptr + at, mask=live, other=0.0)
    grad = (grad - tl.sum(grad * unit, axis=1)[:, None] * unit) * inverse[:, None]
    image, start, _ = _window(level, row, T, S)
    source = _source(place_ptr, image, start, live & (level == 0), T, STRIPS)
    at = tl.where(level == 0, source, at)
    tl.store(out_ptr + at[:, None] * D + d[None, :], grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_product(acc, grad, weight_ptr, d, c, C, D, UPCAST: tl.constexpr):
    """acc + grad [.., d] @ weight [d, c]."""
    weight = tl.load(weight_ptr + d[:, None] * C + c[None, :], mask=(d < D)[:, None] & (c < C)[None, :], other=0.0)
    grad = grad.to(weight.dtype)
    if UPCAST:
        grad = grad.to(tl.float32)
        weight = weight.to(tl.float32)
    return tl.dot(grad, weight, acc, input_precision="ieee")


@triton.jit
def _project_levels_bwd_kernel(
    grads_ptr,
    weight_a_ptr,
    weight_b_ptr,
    weight_c_ptr,
    place_ptr,
    out_ptr,
    frames,
    rows_a,
    rows_b,
    C,
    D,
    T: tl.constexpr,
    S: tl.constexpr,
    STRIPS: tl.constexpr,
    LEVELS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of the frames as they were given (grid: tiles of images x frames, channel blocks).

    Note: LEVELS has bit 0 for frames, 1 for subwords, 2 for words. fp32 sums; bitwise repeatable.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    image, t = row // T, row % T
    live = row < frames
    source = _source(place_ptr, image, t, live, T, STRIPS)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        mask = live[:, None] & (d < D)[None, :]
        if LEVELS & 1:
            grad = tl.load(grads_ptr + source[:, None] * D + d[None, :], mask=mask, other=0.0)
            acc = _add_product(acc, grad, weight_a_ptr, d, c, C, D, UPCAST)
        if LEVELS & 2:
            total = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for s in range(S):
                start, end = s * T // S, ((s + 1) * T + S - 1) // S
                inside = mask & ((t >= start) & (t < end))[:, None]
                at = (rows_a + image * S + s).to(tl.int64)
                part = tl.load(grads_ptr + at[:, None] * D + d[None, :], mask=inside, other=0.0)
                total += part.to(tl.float32) * (1.0 / (end - start))
            acc = _add_product(acc, total, weight_b_ptr, d, c, C, D, UPCAST)
        if LEVELS & 4:
            at = (rows_a + rows_b + image).to(tl.int64)
            part = tl.load(grads_ptr + at[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
            acc = _add_product(acc, part * (1.0 / T), weight_c_ptr, d, c, C, D, UPCAST)
    target = out_ptr + source[:, None] * C + c[None, :]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & (c < C)[None, :])


def rows_of(frames: Tensor, num_subwords: int, levels: Sequence[int]) -> list[int]:
    """Rows of frame, subword and word level; 0 for a level that is not among `levels`."""
    batch, length, _ = frames.shape
    return [rows if i in levels else 0 for i, rows in enumerate((batch * length, batch * num_subwords, batch))]


def _every(given: Sequence[Tensor], levels: Sequence[int]) -> list[Tensor]:
    """One tensor for each of the three levels; for a level that is absent any (it has no rows)."""
    by_level = dict(zip(levels, given))
    return [by_level.get(i, given[0]).contiguous() for i in range(3)]


def _shape(frames: Tensor, num_subwords: int, order: Tensor | None, width: int) -> dict[str, int]:
    return {
        "T": frames.shape[1],
        "S": num_subwords,
        "STRIPS": 0 if order is None else order.shape[1],
        "BLOCK_M": BLOCK_M,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
    }


def project_levels_fwd(
    frames: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    levels: Sequence[int],
    num_subwords: int,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of the levels, one level below the other.

    Args:
        frames: [B, T, C] float16, bfloat16 or float32.
        weights: [D, C] of each level, dtype of `frames`.
        biases: [D] of each level.
        levels: of weights and biases: 0 frame, 1 subword, 2 word, ascending.
        num_subwords: S.
        order: [B, N] int64 permutation of the batch's strips, or None.
    Returns:
        Rows [R, D] float32, their 1 / norm [R] float32, and averages [B (S + 1) or less, C] of subwords and words.
    """
    frames, width = frames.contiguous(), weights[0].shape[0]
    counts = rows_of(frames, num_subwords, levels)
    rows = torch.empty(sum(counts), width, dtype=torch.float32, device=frames.device)
    inverse = rows.new_empty(len(rows))
    pooled = frames.new_empty(sum(counts[1:]), frames.shape[2])
    tiles = sum(triton.cdiv(count, BLOCK_M) for count in counts)
    if tiles:
        with runtime.on_device(frames.device):
            _project_levels_fwd_kernel[(tiles,)](
                frames,
                frames if order is None else _inverse(order),
                *_every(weights, levels),
                *_every(biases, levels),
                rows,
                inverse,
                pooled,
                *counts,
                frames.shape[2],
                width,
                **_shape(frames, num_subwords, order, width),
                EPS=EPS,
                BLOCK_K=BLOCK_K,
                UPCAST=runtime.interpreted() and frames.dtype == torch.bfloat16,
                num_warps=warps(width),
            )
    return rows, inverse, pooled


def project_levels_bwd(
    grad: Tensor,
    frames: Tensor,
    weights: Sequence[Tensor],
    levels: Sequence[int],
    num_subwords: int,
    order: Tensor | None,
    rows: Tensor,
    inverse: Tensor,
    pooled: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of frames [B, T, C], weights [D, C] and biases [D] (float32) of each level.

    Args:
        grad: [R, D]; gradient of the unit rows.
        frames: as in the forward.
        weights: as in the forward.
        levels: as in the forward.
        num_subwords: S.
        order: as in the forward.
        rows: result of the forward.
        inverse: result of the forward.
        pooled: result of the forward.
    """
    frames, (batch, length, channels), width = frames.contiguous(), frames.shape, rows.shape[1]
    counts, shape = rows_of(frames, num_subwords, levels), _shape(frames, num_subwords, order, width)
    grads = torch.empty(rows.shape, dtype=frames.dtype, device=frames.device)
    out = torch.empty_like(frames)
    if frames.numel():
        with runtime.on_device(frames.device):
            place = frames if order is None else _inverse(order)
            tiles = sum(triton.cdiv(count, BLOCK_M) for count in counts)
            _project_levels_rows_kernel[(tiles,)](
                grad.contiguous(), rows, inverse, place, grads, *counts, width, **shape, num_warps=warps(width)
            )
            _project_levels_bwd_kernel[(triton.cdiv(batch * length, BLOCK_M), triton.cdiv(channels, BLOCK_K))](
                grads,
                *_every(weights, levels),
                place,
                out,
                batch * length,
                *counts[:2],
                channels,
                width,
                **shape | {"BLOCK_D": BLOCK_D},
                LEVELS=sum(1 << i for i in levels),
                BLOCK_K=BLOCK_K,
                UPCAST=runtime.interpreted() and frames.dtype == torch.bfloat16,
            )
    by_level = dict(zip(range(3), grads.split(counts)))
    inputs = dict(zip(range(3), (frames.flatten(0, 1), *pooled.split(counts[1:]))))
    return out, [by_level[i].T @ inputs[i] for i in levels], [by_level[i].sum(0, dtype=torch.float32) for i in levels]
