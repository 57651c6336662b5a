"""Batch norm of dense channels_last maps (or rows) over groups of images, with residual and ReLU, forward and backward.

A map is a matrix of rows (sites) and columns (channels). A batch is `passes` equal parts; each is cut into groups of
`span` rows, the last of which may be longer or shorter. A group's statistics: its rows are dealt to a fixed number of
programs, each combines the counts, means and squared deviations of its blocks (Chan), and one program a group adds the
programs' results in a fixed order: no E[x^2] - E[x]^2, no atomics, bitwise repeatable. Arithmetic in fp32.
Bytes a value of b bytes: forward reads x twice and writes once (and reads the residual): 3b (4b). Backward reads the
gradient and x twice, writes one gradient: 5b; the ReLU's sign is computed again from x, with a residual it is read from
the result and a second gradient is written: 8b.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import runtime

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
):  # fmt: skip
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
        here = tl.sum((row < end).to(tl.float32), axis=0)
        average = tl.sum(x, axis=0) / tl.maximum(here, 1.0)
        centred = tl.where(mask, x - average[None, :], 0.0)
        total = count + here
        share = here / tl.maximum(total, 1.0)
        delta = average - mean
        mean += delta * share
        m2 += tl.sum(centred * centred, axis=0) + delta * delta * count * share
        count = total
    at = partials_ptr + (group.to(tl.int64) * parts + tl.program_id(0)) * 2 * C + c
    tl.store(at, mean, mask=c < C)
    tl.store(at + C, m2, mask=c < C)


@triton.jit
def _batch_norm_moments_kernel(
    partials_ptr, mean_ptr, rstd_ptr, var_ptr, C, groups, rows, span, blocks, parts, eps,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
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
    x_ptr, residual_ptr, scale_ptr, shift_ptr, out_ptr, mean_ptr, rstd_ptr, C, groups, rows, span,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = (x - mean) rstd weight + bias (+ residual) (ReLU)."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = _first_row(group, groups, rows, span) + tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (row < _first_row(group + 1, groups, rows, span))[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + group * C + c, mask=c < C, other=0.0)
    scale = tl.load(rstd_ptr + group * C + c, mask=c < C, other=0.0) * tl.load(scale_ptr + c, mask=c < C, other=0.0)
    y = (x - mean[None, :]) * scale[None, :] + tl.load(shift_ptr + c, mask=c < C, other=0.0)[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _through_relu(
    d, normal, at, mask, out_ptr, scale, shift, RESIDUAL: tl.constexpr, RELU: tl.constexpr
):  # fmt: skip
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
    grad_ptr, x_ptr, out_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, partials_ptr, C, groups, rows, span, blocks,
    parts, RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials[group, part, 0..1, c] = sums of d and d (x - mean) rstd, d the gradient that ReLU lets through."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = _first_row(group + 1, groups, rows, span)
    first = _first_row(group, groups, rows, span) + tl.program_id(0).to(tl.int64) * blocks * BLOCK_R
    mean = tl.load(mean_ptr + group * C + c, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group * C + c, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)
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
    grad_ptr, x_ptr, out_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, sums_ptr, grad_x_ptr, grad_residual_ptr, C,
    groups, rows, span, RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x = weight rstd (d - mean(d) - xhat mean(d xhat)) and grad_residual = d."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = _first_row(group, groups, rows, span), _first_row(group + 1, groups, rows, span)
    row = begin + tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (row < end)[:, None] & (c < C)[None, :]
    at = row[:, None] * C + c[None, :]
    mean = tl.load(mean_ptr + group * C + c, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group * C + c, mask=c < C, other=0.0)
    scale = tl.load(scale_ptr + c, mask=c < C, other=0.0)
    shift = tl.load(shift_ptr + c, mask=c < C, other=0.0)
    d = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    normal = (x - mean[None, :]) * rstd[None, :]
    d = _through_relu(d, normal, at, mask, out_ptr, scale, shift, RESIDUAL, RELU)
    if RESIDUAL:
        tl.store(grad_residual_ptr + at, d.to(grad_residual_ptr.dtype.element_ty), mask=mask)
    one_over = 1.0 / (end - begin).to(tl.float32)
    average = tl.load(sums_ptr + group * 2 * C + c, mask=c < C, other=0.0) * one_over
    moment = tl.load(sums_ptr + (group * 2 + 1) * C + c, mask=c < C, other=0.0) * one_over
    gradient = (rstd * scale)[None, :] * (d - average[None, :] - normal * moment[None, :])
    tl.store(grad_x_ptr + at, gradient.to(grad_x_ptr.dtype.element_ty), mask=mask)


class Groups:
    """How the rows of a batch divide into groups, and the grids that follow.

    Args:
        rows: rows of a pass.
        passes: equal parts of the batch.
        sizes: rows of each group of a pass; all but the last are of one size.
        channels: C.
        device: where kernels run.
    """

    def __init__(self, rows: int, passes: int, sizes: list[int], channels: int, device: torch.device) -> None:
        self.number = passes * len(sizes)
        self.where = (channels, len(sizes), rows, sizes[0])
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
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    out: Tensor,
    groups: Groups,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the normalised rows.

    Args:
        x: rows of C channels side by side in memory (a channels_last map, or a matrix).
        weight: [C] float32.
        bias: [C] float32.
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
        _batch_norm_stats_kernel[groups.stats_grid](
            x, partials, *groups.where, groups.blocks, groups.parts, **blocks
        )  # fmt: skip
        _batch_norm_moments_kernel[(groups.number, groups.columns)](
            partials, mean, rstd, var, *groups.where, groups.blocks, groups.parts, eps, BLOCK_P=BLOCK_P, **blocks
        )
        _batch_norm_apply_kernel[groups.grid](
            x, x if residual is None else residual, weight, bias, out, mean, rstd, *groups.where,
            RESIDUAL=residual is not None, RELU=relu, **blocks,
        )  # fmt: skip
    return mean, rstd, var


def batch_norm_bwd(
    grad: Tensor, x: Tensor, out: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, grad_x: Tensor,
    grad_residual: Tensor | None, groups: Groups, relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write grad_x and grad_residual.

    Args:
        grad: gradient of the result, like x in memory.
        x: as in the forward.
        out: the forward's result; read with a residual and ReLU only.
        weight: as in the forward.
        bias: as in the forward.
        mean: of the forward.
        rstd: of the forward.
        grad_x: like x.
        grad_residual: like x, or None without a residual.
        groups: as in the forward.
        relu: as in the forward.
    Returns:
        Gradients of weight and bias, [C] float32.
    """
    partials = torch.empty(groups.number, groups.parts, 2, groups.where[0], dtype=torch.float32, device=x.device)
    flags = {"RESIDUAL": grad_residual is not None, "RELU": relu, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C}
    with runtime.on_device(x.device):
        _batch_norm_sums_kernel[groups.stats_grid](
            grad, x, out, weight, bias, mean, rstd, partials, *groups.where, groups.blocks, groups.parts, **flags
        )
        sums = partials.sum(1)
        _batch_norm_grad_kernel[groups.grid](
            grad, x, out, weight, bias, mean, rstd, sums, grad_x, grad_x if grad_residual is None else grad_residual,
            *groups.where, **flags,
        )  # fmt: skip
    total = sums.sum(0)
    return total[1], total[0]
