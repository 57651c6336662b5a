"""Batch norm of dense channels_last maps (or rows) over groups of images, with residual and ReLU, forward and backward.

A map is a matrix of rows (sites) and columns (channels). A batch consists of `passes` equal parts; each part is cut
into groups of `span` rows, of which the last one may be longer or shorter. The rows of a group are dealt to a fixed
number of programs. Each program combines the counts, means and squared deviations of its blocks, and one program for
each group adds the results of the others in a fixed order, so there are no atomics and results repeat bit for bit.

Memory traffic, for values of b bytes: the forward reads x twice and writes once, and reads the residual if there is
one: 3b (4b) for each value. The backward reads the gradient and x twice and writes one gradient: 5b. It computes the
sign of the ReLU again from x; with a residual it reads the sign from the result, and writes a second gradient: 8b.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import norms, runtime

BLOCK_R = 64
BLOCK_C = 64
#: Partial statistics that are added at a time.
BLOCK_P = 32
#: Programs of a statistics pass that each multiprocessor gets.
PROGRAMS = 4


@triton.jit
def _first_row(group, groups, rows, span):
    """First row of a group; `groups` a pass of `rows` rows."""
    return (group // groups).to(tl.int64) * rows + (group % groups).to(tl.int64) * span


@triton.jit
def _batch_norm_stats_kernel(
    x_ptr, partials_ptr, C, groups, rows, span, blocks, parts, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """partials[group, part, 0..1, c] = mean and squared deviations of `blocks` blocks of rows."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = _first_row(group + 1, groups, rows, span)
    first = _first_row(group, groups, rows, span) + tl.program_id(0).to(tl.int64) * blocks * BLOCK_R
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for block in range(blocks):
        row = first + block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + row[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        count, mean, m2 = norms.add_block(count, mean, m2, x, row < end, mask)
    at = partials_ptr + (group.to(tl.int64) * parts + tl.program_id(0)) * 2 * C + c
    tl.store(at, mean, mask=c < C)
    tl.store(at + C, m2, mask=c < C)


@triton.jit
def _batch_norm_moments_kernel(
    partials_ptr,
    mean_ptr,
    rstd_ptr,
    var_ptr,
    C,
    groups,
    rows,
    span,
    blocks,
    parts,
    eps,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean, rstd and unbiased variance [groups, C] from the partial statistics."""
    group = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    size = _first_row(group + 1, groups, rows, span) - _first_row(group, groups, rows, span)
    number = size.to(tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        count = tl.minimum(tl.maximum(size - part.to(tl.int64) * blocks * BLOCK_R, 0), blocks * BLOCK_R).to(tl.float32)
        mask = (part < parts)[:, None] & (c < C)[None, :]
        at = partials_ptr + (group.to(tl.int64) * parts + part[:, None]) * 2 * C + c[None, :]
        mean += tl.sum(tl.load(at, mask=mask, other=0.0) * (count / number)[:, None], axis=0)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        count = tl.minimum(tl.maximum(size - part.to(tl.int64) * blocks * BLOCK_R, 0), blocks * BLOCK_R).to(tl.float32)
        mask = (part < parts)[:, None] & (c < C)[None, :]
        at = partials_ptr + (group.to(tl.int64) * parts + part[:, None]) * 2 * C + c[None, :]
        delta = tl.load(at, mask=mask, other=0.0) - mean[None, :]
        inner = tl.load(at + C, mask=mask, other=0.0)
        m2 += tl.sum(tl.where(mask, inner + delta * delta * count[:, None], 0.0), axis=0)
    out = group * C + c
    tl.store(mean_ptr + out, mean, mask=c < C)
    tl.store(rstd_ptr + out, 1.0 / tl.sqrt(m2 / number + eps), mask=c < C)
    tl.store(var_ptr + out, m2 / tl.maximum(number - 1.0, 1.0), mask=c < C)


@triton.jit
def _batch_norm_apply_kernel(
    x_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    C,
    groups,
    rows,
    span,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = (x - mean) rstd weight + bias (+ residual) (ReLU)."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = _first_row(group, groups, rows, span) + tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (row < _first_row(group + 1, groups, rows, span))[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    mean = norms.channels(mean_ptr, group * C, c, C)
    scale = norms.channels(rstd_ptr, group * C, c, C) * norms.channels(scale_ptr, 0, c, C)
    shift = norms.channels(shift_ptr, 0, c, C)
    norms.apply(x_ptr, residual_ptr, out_ptr, at, mask, mean, scale, shift, RESIDUAL, RELU)


@triton.jit
def _through_relu(d, normal, at, mask, out_ptr, scale, shift, RESIDUAL: tl.constexpr, RELU: tl.constexpr):
    """The gradient that the ReLU lets through."""
    if RELU:
        if RESIDUAL:
            open_ = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32) > 0.0
        else:
            open_ = normal * scale[None, :] + shift[None, :] > 0.0
        d = tl.where(open_, d, 0.0)
    return d


@triton.jit
def _batch_norm_sums_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    partials_ptr,
    C,
    groups,
    rows,
    span,
    blocks,
    parts,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials[group, part, 0..1, c] = sums of d and d (x - mean) rstd, d the gradient that ReLU lets through."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = _first_row(group + 1, groups, rows, span)
    first = _first_row(group, groups, rows, span) + tl.program_id(0).to(tl.int64) * blocks * BLOCK_R
    mean, rstd = norms.channels(mean_ptr, group * C, c, C), norms.channels(rstd_ptr, group * C, c, C)
    scale, shift = norms.channels(scale_ptr, 0, c, C), norms.channels(shift_ptr, 0, c, C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    moment = tl.zeros((BLOCK_C,), tl.float32)
    for block in range(blocks):
        row = first + block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < end)[:, None] & (c < C)[None, :]
        at = row[:, None] * C + c[None, :]
        d = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        normal = (x - mean[None, :]) * rstd[None, :]
        d = _through_relu(d, normal, at, mask, out_ptr, scale, shift, RESIDUAL, RELU)
        total += tl.sum(d, axis=0)
        moment += tl.sum(d * normal, axis=0)
    at = partials_ptr + (group.to(tl.int64) * parts + tl.program_id(0)) * 2 * C + c
    tl.store(at, total, mask=c < C)
    tl.store(at + C, moment, mask=c < C)


@triton.jit
def _batch_norm_grad_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    C,
    groups,
    rows,
    span,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x = weight rstd (d - mean(d) - xhat mean(d xhat)) and grad_residual = d."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = _first_row(group, groups, rows, span), _first_row(group + 1, groups, rows, span)
    row = begin + tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (row < end)[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    mean, rstd = norms.channels(mean_ptr, group * C, c, C), norms.channels(rstd_ptr, group * C, c, C)
    scale, shift = norms.channels(scale_ptr, 0, c, C), norms.channels(shift_ptr, 0, c, C)
    d = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    normal = (x - mean[None, :]) * rstd[None, :]
    d = _through_relu(d, normal, at, mask, out_ptr, scale, shift, RESIDUAL, RELU)
    if RESIDUAL:
        tl.store(grad_residual_ptr + at, d.to(grad_residual_ptr.dtype.element_ty), mask=mask)
    one_over = 1.0 / (end - begin).to(tl.float32)
    average = norms.channels(sums_ptr, group * 2 * C, c, C) * one_over
    moment = norms.channels(sums_ptr, (group * 2 + 1) * C, c, C) * one_over
    norms.store_gradient(grad_x_ptr, at, mask, d, normal, rstd * scale, average, moment)


class Groups:
    """How the rows of a batch divide into groups, and the grids that follow.

    Args:
        sizes: rows of each group of a pass; all but the last are of one size.
        passes: equal parts of the batch.
        channels: C.
        device: where kernels run.
    """

    def __init__(self, sizes: list[int], passes: int, channels: int, device: torch.device) -> None:
        self.number = passes * len(sizes)
        self.where = (channels, len(sizes), sum(sizes), sizes[0])
        columns = triton.cdiv(channels, BLOCK_C)
        whole = triton.cdiv(max(sizes), BLOCK_R)
        wanted = triton.cdiv(PROGRAMS * runtime.multiprocessors(device), columns * self.number)
        self.blocks = triton.cdiv(whole, min(whole, wanted))
        self.parts = triton.cdiv(whole, self.blocks)
        self.columns = columns
        self.grid = (whole, self.number, columns)
        self.stats_grid = (self.parts, self.number, columns)


def batch_norm_fwd(
    x: Tensor,
    affine: tuple[Tensor, Tensor],
    residual: Tensor | None,
    out: Tensor,
    groups: Groups,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the normalised rows.

    Args:
        x: rows of C channels side by side in memory (a channels_last map, or a matrix).
        affine: weight and bias, [C] float32.
        residual: like x, or None.
        out: like x.
        groups: of the rows of x.
        eps: added to the variance.
        relu: apply ReLU.
    Returns:
        mean, rstd and unbiased variance, [groups, C] float32.
    """
    channels = groups.where[0]
    partials = torch.empty(groups.number, groups.parts, 2, channels, dtype=torch.float32, device=x.device)
    mean, rstd, var = (partials.new_empty(groups.number, channels) for _ in range(3))
    blocks = {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C}
    with runtime.on_device(x.device):
        _batch_norm_stats_kernel[groups.stats_grid](x, partials, *groups.where, groups.blocks, groups.parts, **blocks)
        _batch_norm_moments_kernel[(groups.number, groups.columns)](
            partials, mean, rstd, var, *groups.where, groups.blocks, groups.parts, eps, BLOCK_P=BLOCK_P, **blocks
        )
        _batch_norm_apply_kernel[groups.grid](
            x,
            x if residual is None else residual,
            *affine,
            out,
            mean,
            rstd,
            *groups.where,
            RESIDUAL=residual is not None,
            RELU=relu,
            **blocks,
        )
    return mean, rstd, var


def batch_norm_bwd(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    affine: tuple[Tensor, Tensor],
    moments: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    groups: Groups,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Write grad_x and grad_residual.

    Args:
        grad: gradient of the result, like x in memory.
        x: as in the forward.
        out: the forward's result; read with a residual and ReLU only.
        affine: as in the forward.
        moments: mean and rstd of the forward.
        grads: grad_x and grad_residual (None without a residual), like x; written here.
        groups: as in the forward.
        relu: as in the forward.
    Returns:
        Gradients of weight and bias, [C] float32.
    """
    grad_x, grad_residual = grads
    partials = torch.empty(groups.number, groups.parts, 2, groups.where[0], dtype=torch.float32, device=x.device)
    flags = {"RESIDUAL": grad_residual is not None, "RELU": relu, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C}
    with runtime.on_device(x.device):
        _batch_norm_sums_kernel[groups.stats_grid](
            grad, x, out, *affine, *moments, partials, *groups.where, groups.blocks, groups.parts, **flags
        )
        sums = partials.sum(1)
        _batch_norm_grad_kernel[groups.grid](
            grad,
            x,
            out,
            *affine,
            *moments,
            sums,
            grad_x,
            grad_x if grad_residual is None else grad_residual,
            *groups.where,
            **flags,
        )
    total = sums.sum(0)
    return total[1], total[0]
