"""Batch norm over the active sites of dense channels_last maps, with residual and ReLU, forward and backward.

Programs go through blocks of sites of one group of images and load the active ones only. Every block gives its count,
mean and squared deviations, which are exact within the block; they are combined in a fixed order, so results repeat bit
for bit. Where the convolution in front has left these statistics behind (`conv`, STATS), they are not taken again. The
backward takes its two sums in the same way.

Memory traffic: the forward reads x twice (once after such a convolution) and writes once. The backward reads x, out and
the gradient twice and writes one or two gradients. Inactive sites are neither read nor written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import norms, runtime

BLOCK_S = 64
BLOCK_C = 64
#: Blocks of sites that one program of the two passes over statistics goes through.
STEPS = 8
#: Shape of a block where partial statistics are combined. Many parts at a time keep the loop short; few channels at a
#: time give enough programs to fill a GPU even where a layer has few channels.
MOMENTS_P = 128
MOMENTS_C = 16


@triton.jit
def _sites(group, block, active_ptr, span, total, BLOCK_S: tl.constexpr):
    """Sites of one block of a group and which of them are active; `span` sites a group, the last one to `total`."""
    first = group.to(tl.int64) * span
    size = tl.where(group == tl.num_programs(1) - 1, total - first, span)
    inside = block * BLOCK_S + tl.arange(0, BLOCK_S)
    sites = first + inside
    return sites, tl.load(active_ptr + sites, mask=inside < size, other=0) != 0


@triton.jit
def _masked_norm_stats_kernel(
    x_ptr,
    active_ptr,
    partials_ptr,
    C,
    span,
    total,
    blocks,
    STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials[group, part, 0..2, c] = count, mean, squared deviations of STEPS blocks of sites."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(STEPS):
        sites, active = _sites(group, tl.program_id(0) * STEPS + step, active_ptr, span, total, BLOCK_S)
        mask = active[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + sites[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        count, mean, m2 = norms.add_block(count, mean, m2, x, active, mask)
    at = partials_ptr + ((group * blocks + tl.program_id(0)) * 3).to(tl.int64) * C + c
    tl.store(at, tl.zeros((BLOCK_C,), tl.float32) + count, mask=c < C)
    tl.store(at + C, mean, mask=c < C)
    tl.store(at + 2 * C, m2, mask=c < C)


@triton.jit
def _masked_norm_moments_kernel(
    partials_ptr,
    mean_ptr,
    rstd_ptr,
    numbers_ptr,
    count_ptr,
    C,
    blocks,
    eps,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean, rstd [groups, C] and counts [groups] from the partial statistics, BLOCK_P parts at a time, in their order.

    ROWS above 0: the parts are tiles of so many active rows of one group, of which there are `count`.
    """
    group = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    parts = blocks
    if ROWS > 0:
        parts = tl.cdiv(tl.load(count_ptr), ROWS)
    count = tl.zeros((BLOCK_C,), tl.float32)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        mask = (part < parts)[:, None] & (c < C)[None, :]
        at = partials_ptr + ((group * blocks + part) * 3).to(tl.int64)[:, None] * C + c[None, :]
        number = tl.load(at, mask=mask, other=0.0)
        average = tl.load(at + C, mask=mask, other=0.0)
        here = tl.sum(number, axis=0)
        together = tl.sum(number * average, axis=0) / tl.maximum(here, 1.0)
        delta = average - together[None, :]
        inner = tl.load(at + 2 * C, mask=mask, other=0.0) + delta * delta * number
        count, mean, m2 = norms.combine(count, mean, m2, here, together, tl.sum(inner, axis=0))
    tl.store(mean_ptr + group * C + c, mean, mask=c < C)
    tl.store(rstd_ptr + group * C + c, 1.0 / tl.sqrt(m2 / tl.maximum(count, 1.0) + eps), mask=c < C)
    tl.store(numbers_ptr + group, tl.max(count, axis=0))


@triton.jit
def _masked_norm_apply_kernel(
    x_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    active_ptr,
    mean_ptr,
    rstd_ptr,
    C,
    span,
    total,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = (x - mean) rstd weight + bias (+ residual) (ReLU) at active sites."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    sites, active = _sites(group, tl.program_id(0), active_ptr, span, total, BLOCK_S)
    mask = active[:, None] & (c < C)[None, :]
    at = sites[:, None] * C + c[None, :]
    mean = norms.channels(mean_ptr, group * C, c, C)
    scale = norms.channels(rstd_ptr, group * C, c, C) * norms.channels(scale_ptr, 0, c, C)
    shift = norms.channels(shift_ptr, 0, c, C)
    norms.apply(x_ptr, residual_ptr, out_ptr, at, mask, mean, scale, shift, RESIDUAL, RELU)


@triton.jit
def _masked_norm_sums_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    active_ptr,
    mean_ptr,
    rstd_ptr,
    partials_ptr,
    C,
    span,
    total,
    blocks,
    RELU: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials[0..1, group, part, c] = sums of d and d (x - mean) rstd, d the gradient that ReLU lets through."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd = norms.channels(mean_ptr, group * C, c, C), norms.channels(rstd_ptr, group * C, c, C)
    plain = tl.zeros((BLOCK_C,), tl.float32)
    moment = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(STEPS):
        sites, active = _sites(group, tl.program_id(0) * STEPS + step, active_ptr, span, total, BLOCK_S)
        mask = active[:, None] & (c < C)[None, :]
        at = sites[:, None] * C + c[None, :]
        d = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            d = tl.where(tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32) > 0.0, d, 0.0)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        normal = tl.where(mask, (x - mean[None, :]) * rstd[None, :], 0.0)
        plain += tl.sum(d, axis=0)
        moment += tl.sum(d * normal, axis=0)
    at = partials_ptr + (group * blocks + tl.program_id(0)).to(tl.int64) * C + c
    tl.store(at, plain, mask=c < C)
    tl.store(at + (tl.num_programs(1) * blocks).to(tl.int64) * C, moment, mask=c < C)


@triton.jit
def _masked_norm_grad_kernel(
    grad_ptr,
    x_ptr,
    out_ptr,
    scale_ptr,
    active_ptr,
    mean_ptr,
    rstd_ptr,
    plain_ptr,
    moment_ptr,
    numbers_ptr,
    grad_x_ptr,
    grad_residual_ptr,
    C,
    span,
    total,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x = weight rstd (d - mean(d) - xhat mean(d xhat)) and grad_residual = d at active sites."""
    group = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    sites, active = _sites(group, tl.program_id(0), active_ptr, span, total, BLOCK_S)
    mask = active[:, None] & (c < C)[None, :]
    at = sites[:, None] * C + c[None, :]
    d = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        d = tl.where(tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32) > 0.0, d, 0.0)
    if RESIDUAL:
        tl.store(grad_residual_ptr + at, d.to(grad_residual_ptr.dtype.element_ty), mask=mask)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mean, rstd = norms.channels(mean_ptr, group * C, c, C), norms.channels(rstd_ptr, group * C, c, C)
    one_over = 1.0 / tl.maximum(tl.load(numbers_ptr + group), 1.0)
    average = norms.channels(plain_ptr, group * C, c, C) * one_over
    moment = norms.channels(moment_ptr, group * C, c, C) * one_over
    normal = (x - mean[None, :]) * rstd[None, :]
    scale = rstd * norms.channels(scale_ptr, 0, c, C)
    norms.store_gradient(grad_x_ptr, at, mask, d, normal, scale, average, moment)


class Groups:
    """The active sites of a batch in statistics groups, and the grids that follow.

    Args:
        active: [B, 1, h, w] bool, contiguous.
        images: images in each group: all but the last of one size.
        channels: C.
    """

    def __init__(self, active: Tensor, images: list[int], channels: int) -> None:
        self.active, self.number, self.channels = active, len(images), channels
        per_image = active.shape[2] * active.shape[3]
        blocks, columns = max(1, triton.cdiv(max(images) * per_image, BLOCK_S)), triton.cdiv(channels, BLOCK_C)
        #: Sites of a group and of the batch.
        self.sites = (images[0] * per_image, active.shape[0] * per_image)
        self.grid = (blocks, self.number, columns)
        self.stats_grid = (triton.cdiv(blocks, STEPS), self.number, columns)


def masked_norm_fwd(
    x: Tensor,
    affine: tuple[Tensor, Tensor],
    residual: Tensor | None,
    out: Tensor,
    groups: Groups,
    eps: float,
    relu: bool,
    left: tuple[Tensor, int, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the result at the active sites of `out`.

    Args:
        x: [B, C, h, w] channels_last, B above 0.
        affine: weight and bias, [C] float32.
        residual: like x, channels_last, or None.
        out: like x; inactive sites are not written.
        groups: of the sites of x.
        eps: added to the variance.
        relu: apply ReLU.
        left: of one group, the statistics that `masked_conv` has left: partials [tiles, 3, C], rows of a tile, and the
            count [1] int32 of active rows. None: they are taken here.
    Returns:
        mean, rstd [groups, C] and counts [groups], float32.
    """
    channels, blocks = groups.channels, {"BLOCK_S": BLOCK_S, "BLOCK_C": BLOCK_C}
    mean, rstd = (torch.empty(groups.number, channels, dtype=torch.float32, device=x.device) for _ in range(2))
    counts = mean.new_empty(groups.number)
    with runtime.on_device(x.device):
        if left is None:
            parts = groups.stats_grid[0]
            partials, rows, count = mean.new_empty(groups.number, parts, 3, channels), 0, counts
            _masked_norm_stats_kernel[groups.stats_grid](
                x, groups.active, partials, channels, *groups.sites, parts, STEPS=STEPS, **blocks
            )
        else:
            partials, rows, count = left
        _masked_norm_moments_kernel[(groups.number, triton.cdiv(channels, MOMENTS_C))](
            partials,
            mean,
            rstd,
            counts,
            count,
            channels,
            partials.shape[-3],
            eps,
            ROWS=rows,
            BLOCK_P=MOMENTS_P,
            BLOCK_C=MOMENTS_C,
        )
        _masked_norm_apply_kernel[groups.grid](
            x,
            x if residual is None else residual,
            *affine,
            out,
            groups.active,
            mean,
            rstd,
            channels,
            *groups.sites,
            RESIDUAL=residual is not None,
            RELU=relu,
            **blocks,
        )
    return mean, rstd, counts


def masked_norm_bwd(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    weight: Tensor,
    moments: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    groups: Groups,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Write grad_x and grad_residual at the active sites.

    Args:
        grad: gradient of the result, channels_last like all maps here.
        x: as in the forward.
        out: the forward's result.
        weight: as in the forward.
        moments: mean, rstd and counts of the forward.
        grads: grad_x and grad_residual (None without a residual), like x; written here.
        groups: as in the forward.
        relu: as in the forward.
    Returns:
        Gradients of weight and bias, [C] float32 each, in memory of their own.
    """
    (mean, rstd, counts), (grad_x, grad_residual) = moments, grads
    channels, blocks, parts = groups.channels, {"BLOCK_S": BLOCK_S, "BLOCK_C": BLOCK_C}, groups.stats_grid[0]
    partials = torch.empty(2, groups.number, parts, channels, dtype=torch.float32, device=x.device)
    with runtime.on_device(x.device):
        _masked_norm_sums_kernel[groups.stats_grid](
            grad,
            x,
            out,
            groups.active,
            mean,
            rstd,
            partials,
            channels,
            *groups.sites,
            parts,
            RELU=relu,
            STEPS=STEPS,
            **blocks,
        )
        plain, moment = (part.sum(1) for part in partials)
        _masked_norm_grad_kernel[groups.grid](
            grad,
            x,
            out,
            weight,
            groups.active,
            mean,
            rstd,
            plain,
            moment,
            counts,
            grad_x,
            grad_x if grad_residual is None else grad_residual,
            channels,
            *groups.sites,
            RESIDUAL=grad_residual is not None,
            RELU=relu,
            **blocks,
        )
    return (moment[0], plain[0]) if groups.number == 1 else (moment.sum(0), plain.sum(0))
