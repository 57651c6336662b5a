"""Batch norm over the active sites of dense channels_last maps, with residual and ReLU, forward and backward.

Programs walk blocks of sites of one group of images and load the active ones only. Statistics: every block gives its
count, mean and squared deviations (exact within the block), combined in the order of the blocks (Chan), so there is no
E[x^2] - E[x]^2 and results repeat bit for bit. The backward takes its two sums the same way. Arithmetic is fp32.
Bytes, active share a: forward reads x twice and writes once, backward reads x, out and the gradient twice and writes one
or two gradients; inactive sites are neither read nor written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import runtime

BLOCK_S = 64
BLOCK_C = 64
#: Site blocks a program of the two passes over statistics walks through.
STEPS = 8


@triton.jit
def _sites(first_ptr, group, block, active_ptr, per_image, BLOCK_S: tl.constexpr):
    """Sites of one block of a group and which of them are active."""
    end = tl.load(first_ptr + group + 1).to(tl.int64) * per_image
    sites = tl.load(first_ptr + group).to(tl.int64) * per_image + block * BLOCK_S + tl.arange(0, BLOCK_S)
    return sites, tl.load(active_ptr + sites, mask=sites < end, other=0) != 0


@triton.jit
def _combine(count, mean, m2, other_count, other_mean, other_m2):
    """Counts, means and squared deviations of two sets together."""
    total = count + other_count
    share = other_count / tl.maximum(total, 1.0)
    delta = other_mean - mean
    return total, mean + delta * share, m2 + other_m2 + delta * delta * count * share


@triton.jit
def _masked_norm_stats_kernel(
    x_ptr, active_ptr, first_ptr, partials_ptr, C, per_image, blocks,
    STEPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials[group, part, 0..2, c] = count, mean, squared deviations of STEPS blocks of sites."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(STEPS):
        sites, active = _sites(first_ptr, group, tl.program_id(0) * STEPS + step, active_ptr, per_image, BLOCK_S)
        mask = active[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + sites[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        here = tl.sum(active.to(tl.float32), axis=0)
        average = tl.sum(x, axis=0) / tl.maximum(here, 1.0)
        centred = tl.where(mask, x - average[None, :], 0.0)
        count, mean, m2 = _combine(count, mean, m2, here, average, tl.sum(centred * centred, axis=0))
    at = partials_ptr + ((group * blocks + tl.program_id(0)) * 3).to(tl.int64) * C + c
    tl.store(at, tl.zeros((BLOCK_C,), tl.float32) + count, mask=c < C)
    tl.store(at + C, mean, mask=c < C)
    tl.store(at + 2 * C, m2, mask=c < C)


@triton.jit
def _masked_norm_moments_kernel(partials_ptr, mean_ptr, rstd_ptr, numbers_ptr, C, blocks, eps, BLOCK_C: tl.constexpr):
    """mean, rstd [groups, C] and counts [groups] from the partial statistics, in the order of the parts."""
    group = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = tl.zeros((BLOCK_C,), tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(blocks):
        at = partials_ptr + ((group * blocks + part) * 3).to(tl.int64) * C + c
        other = tl.load(at, mask=c < C, other=0.0)
        other_mean = tl.load(at + C, mask=c < C, other=0.0)
        other_m2 = tl.load(at + 2 * C, mask=c < C, other=0.0)
        count, mean, m2 = _combine(count, mean, m2, other, other_mean, other_m2)
    tl.store(mean_ptr + group * C + c, mean, mask=c < C)
    tl.store(rstd_ptr + group * C + c, 1.0 / tl.sqrt(m2 / tl.maximum(count, 1.0) + eps), mask=c < C)
    tl.store(numbers_ptr + group, tl.max(count, axis=0))


@triton.jit
def _masked_norm_apply_kernel(
    x_ptr, residual_ptr, scale_ptr, shift_ptr, out_ptr, active_ptr, first_ptr, mean_ptr, rstd_ptr, C, per_image,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = (x - mean) rstd weight + bias (+ residual) (ReLU) at active sites."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    sites, active = _sites(first_ptr, group, tl.program_id(0), active_ptr, per_image, BLOCK_S)
    mask = active[:, None] & (c < C)[None, :]
    at = sites[:, None] * C + c[None, :]
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
def _masked_norm_sums_kernel(
    grad_ptr, x_ptr, out_ptr, active_ptr, first_ptr, mean_ptr, rstd_ptr, partials_ptr, C, per_image, blocks,
    RELU: tl.constexpr, STEPS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials[group, part, 0..1, c] = sums of d and d (x - mean) rstd, d the gradient that ReLU lets through."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.load(mean_ptr + group * C + c, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group * C + c, mask=c < C, other=0.0)
    total = tl.zeros((BLOCK_C,), tl.float32)
    moment = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(STEPS):
        sites, active = _sites(first_ptr, group, tl.program_id(0) * STEPS + step, active_ptr, per_image, BLOCK_S)
        mask = active[:, None] & (c < C)[None, :]
        at = sites[:, None] * C + c[None, :]
        d = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            d = tl.where(tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32) > 0.0, d, 0.0)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        normal = tl.where(mask, (x - mean[None, :]) * rstd[None, :], 0.0)
        total += tl.sum(d, axis=0)
        moment += tl.sum(d * normal, axis=0)
    at = partials_ptr + ((group * blocks + tl.program_id(0)) * 2).to(tl.int64) * C + c
    tl.store(at, total, mask=c < C)
    tl.store(at + C, moment, mask=c < C)


@triton.jit
def _masked_norm_grad_kernel(
    grad_ptr, x_ptr, out_ptr, scale_ptr, active_ptr, first_ptr, mean_ptr, rstd_ptr, sums_ptr, numbers_ptr, grad_x_ptr,
    grad_residual_ptr, C, per_image,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x = weight rstd (d - mean(d) - xhat mean(d xhat)) and grad_residual = d at active sites."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    sites, active = _sites(first_ptr, group, tl.program_id(0), active_ptr, per_image, BLOCK_S)
    mask = active[:, None] & (c < C)[None, :]
    at = sites[:, None] * C + c[None, :]
    d = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        d = tl.where(tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32) > 0.0, d, 0.0)
    if RESIDUAL:
        tl.store(grad_residual_ptr + at, d.to(grad_residual_ptr.dtype.element_ty), mask=mask)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + group * C + c, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group * C + c, mask=c < C, other=0.0)
    one_over = 1.0 / tl.maximum(tl.load(numbers_ptr + group), 1.0)
    average = tl.load(sums_ptr + group * 2 * C + c, mask=c < C, other=0.0) * one_over
    moment = tl.load(sums_ptr + (group * 2 + 1) * C + c, mask=c < C, other=0.0) * one_over
    normal = (x - mean[None, :]) * rstd[None, :]
    scale = rstd * tl.load(scale_ptr + c, mask=c < C, other=0.0)
    gradient = scale[None, :] * (d - average[None, :] - normal * moment[None, :])
    tl.store(grad_x_ptr + at, gradient.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _grids(x: Tensor, groups: list[int]) -> tuple[Tensor, int, tuple[int, int, int], tuple[int, int, int]]:
    """First image of each group on the device, sites an image, and the grids of whole passes and of statistics."""
    number = torch.arange(len(groups) + 1, dtype=torch.int32, device=x.device)
    starts = torch.where(number == len(groups), x.shape[0], number * groups[0]).to(torch.int32)
    per_image = x.shape[2] * x.shape[3]
    blocks = max(1, triton.cdiv(max(groups) * per_image, BLOCK_S))
    channels = triton.cdiv(x.shape[1], BLOCK_C)
    return starts, per_image, (blocks, len(groups), channels), (triton.cdiv(blocks, STEPS), len(groups), channels)


def masked_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, active: Tensor, residual: Tensor | None, out: Tensor, groups: list[int],
    eps: float, relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Write the result at the active sites of `out`.

    Args:
        x: [B, C, h, w] channels_last, B above 0.
        weight: [C] float32.
        bias: [C] float32.
        active: [B, 1, h, w] bool, contiguous.
        residual: like x, channels_last, or None.
        out: like x; inactive sites are not written.
        groups: images in each statistics group: all but the last of one size.
        eps: added to the variance.
        relu: apply ReLU.
    Returns:
        mean, rstd [groups, C] and counts [groups], float32.
    """
    starts, per_image, grid, stats_grid = _grids(x, groups)
    channels = x.shape[1]
    partials = torch.empty(len(groups), stats_grid[0], 3, channels, dtype=torch.float32, device=x.device)
    mean, rstd = (partials.new_empty(len(groups), channels) for _ in range(2))
    counts = partials.new_empty(len(groups))
    blocks = {"BLOCK_S": BLOCK_S, "BLOCK_C": BLOCK_C}
    with runtime.on_device(x.device):
        _masked_norm_stats_kernel[stats_grid](
            x, active, starts, partials, channels, per_image, stats_grid[0], STEPS=STEPS, **blocks
        )
        _masked_norm_moments_kernel[(len(groups), grid[2])](
            partials, mean, rstd, counts, channels, stats_grid[0], eps, BLOCK_C=BLOCK_C
        )
        _masked_norm_apply_kernel[grid](
            x, x if residual is None else residual, weight, bias, out, active, starts, mean, rstd, channels, per_image,
            RESIDUAL=residual is not None, RELU=relu, **blocks,
        )  # fmt: skip
    return mean, rstd, counts


def masked_norm_bwd(
    grad: Tensor, x: Tensor, out: Tensor, weight: Tensor, active: Tensor, mean: Tensor, rstd: Tensor, counts: Tensor,
    grad_x: Tensor, grad_residual: Tensor | None, groups: list[int], relu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write grad_x and grad_residual at the active sites.

    Args:
        grad: gradient of the result, channels_last like all maps here.
        x: as in the forward.
        out: the forward's result.
        weight: as in the forward.
        active: as in the forward.
        mean: of the forward.
        rstd: of the forward.
        counts: of the forward.
        grad_x: like x.
        grad_residual: like x, or None.
        groups: as in the forward.
        relu: as in the forward.
    Returns:
        Gradients of weight and bias, [C] float32.
    """
    starts, per_image, grid, stats_grid = _grids(x, groups)
    channels, blocks = x.shape[1], {"BLOCK_S": BLOCK_S, "BLOCK_C": BLOCK_C}
    partials = torch.empty(len(groups), stats_grid[0], 2, channels, dtype=torch.float32, device=x.device)
    with runtime.on_device(x.device):
        _masked_norm_sums_kernel[stats_grid](
            grad, x, out, active, starts, mean, rstd, partials, channels, per_image, stats_grid[0],
            RELU=relu, STEPS=STEPS, **blocks,
        )  # fmt: skip
        sums = partials.sum(1)
        _masked_norm_grad_kernel[grid](
            grad, x, out, weight, active, starts, mean, rstd, sums, counts, grad_x,
            grad_x if grad_residual is None else grad_residual, channels, per_image,
            RESIDUAL=grad_residual is not None, RELU=relu, **blocks,
        )  # fmt: skip
    total = sums.sum(0)
    return total[1], total[0]
