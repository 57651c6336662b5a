"""Max pooling that ignores inactive sites, over dense channels_last maps, forward and backward.

A program handles a block of output sites (backward: input sites) and of channels. The forward notes for each value, in
one byte, under which tap of the window the largest input stood. The backward goes through the outputs that an input
site can have reached and adds the gradients of those that took their value from it, so nothing is added atomically.
Inactive sites are neither read nor written. WINDOW is as in `conv`.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import runtime

BLOCK_S = 16
BLOCK_C = 64


@triton.jit
def _masked_pool_fwd_kernel(
    x_ptr,
    out_ptr,
    which_ptr,
    source_ptr,
    active_ptr,
    sites,
    height,
    width,
    other_height,
    other_width,
    C,
    WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Largest active input of each active output's window (0 without one) and its tap (-1)."""
    KW: tl.constexpr = WINDOW[1]
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    PH: tl.constexpr = WINDOW[4]
    PW: tl.constexpr = WINDOW[5]
    site = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    active = tl.load(active_ptr + site, mask=site < sites, other=0) != 0
    best = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    which = tl.full((BLOCK_S, BLOCK_C), -1, tl.int32)
    for tap in tl.static_range(WINDOW[0] * WINDOW[1]):
        v = (site // width) % height * SH - PH + tap // KW
        u = site % width * SW - PW + tap % KW
        inside = active & (v >= 0) & (v < other_height) & (u >= 0) & (u < other_width)
        source = (site // (width * height) * other_height + v) * other_width + u
        seen = (tl.load(source_ptr + source, mask=inside, other=0) != 0)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + source[:, None] * C + c[None, :], mask=seen, other=0.0).to(tl.float32)
        larger = seen & ((which < 0) | (x > best) | (x != x))
        best = tl.where(larger, x, best)
        which = tl.where(larger, tap, which)
    at = site[:, None] * C + c[None, :]
    mask = active[:, None] & (c < C)[None, :]
    tl.store(out_ptr + at, best.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(which_ptr + at, which.to(tl.int8), mask=mask)


@triton.jit
def _masked_pool_bwd_kernel(
    grad_ptr,
    which_ptr,
    grad_x_ptr,
    source_ptr,
    active_ptr,
    sites,
    height,
    width,
    other_height,
    other_width,
    C,
    WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_x at active inputs: the sum of the gradients of the active outputs that took their value from there."""
    KW: tl.constexpr = WINDOW[1]
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    PH: tl.constexpr = WINDOW[4]
    PW: tl.constexpr = WINDOW[5]
    site = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    source = tl.load(source_ptr + site, mask=site < sites, other=0) != 0
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for tap in tl.static_range(WINDOW[0] * WINDOW[1]):
        y = (site // width) % height + PH - tap // KW
        x = site % width + PW - tap % KW
        whole = (y >= 0) & (x >= 0) & (y % SH == 0) & (x % SW == 0)
        inside = source & whole & (y // SH < other_height) & (x // SW < other_width)
        out = (site // (width * height) * other_height + y // SH) * other_width + x // SW
        seen = (tl.load(active_ptr + out, mask=inside, other=0) != 0)[:, None] & (c < C)[None, :]
        at = out[:, None] * C + c[None, :]
        won = tl.load(which_ptr + at, mask=seen, other=-1) == tap
        total += tl.load(grad_ptr + at, mask=seen & won, other=0.0).to(tl.float32)
    targets = grad_x_ptr + site[:, None] * C + c[None, :]
    tl.store(targets, total.to(grad_x_ptr.dtype.element_ty), mask=source[:, None] & (c < C)[None, :])


def _launch(kernel: object, tensors: tuple[Tensor, ...], own: Tensor, other: Tensor, window: Sequence[int]) -> None:
    sites, channels = own.shape[0] * own.shape[2] * own.shape[3], own.shape[1]
    grid = (triton.cdiv(sites, BLOCK_S), triton.cdiv(channels, BLOCK_C))
    if not sites:
        return
    with runtime.on_device(own.device):
        kernel[grid](  # type: ignore[index]
            *tensors,
            sites,
            *own.shape[2:],
            *other.shape[2:],
            channels,
            WINDOW=tuple(window),
            BLOCK_S=BLOCK_S,
            BLOCK_C=BLOCK_C,
        )


def masked_pool_fwd(
    x: Tensor, source: Tensor, active: Tensor, out: Tensor, which: Tensor, window: Sequence[int]
) -> None:
    """Write the active sites of `out` and `which`.

    Args:
        x: [B, C, h0, w0] channels_last.
        source: [B, 1, h0, w0] bool, contiguous.
        active: [B, 1, h, w] bool, contiguous.
        out: [B, C, h, w] channels_last, dtype of x.
        which: [B, C, h, w] int8 channels_last; winning tap or -1.
        window: rows and columns of kernel, stride and padding: six numbers.
    """
    _launch(_masked_pool_fwd_kernel, (x, out, which, source, active), out, x, window)


def masked_pool_bwd(
    grad: Tensor, which: Tensor, source: Tensor, active: Tensor, grad_x: Tensor, window: Sequence[int]
) -> None:
    """Write the active sites of `grad_x`; arguments as in the forward, grad like its `out`."""
    _launch(_masked_pool_bwd_kernel, (grad, which, grad_x, source, active), grad_x, grad, window)
