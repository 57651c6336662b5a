"""Squared error over hidden pixels: sum mask (prediction - target)^2 / (C sum mask), and its gradient.

Forward: each program sums one block of pixels over the channels and counts its hidden pixels; two sums in a fixed order
follow. Backward recomputes the difference. Visible pixels are never loaded, so NaN there cannot leak.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import runtime

BLOCK = 1024


@triton.jit
def _offsets(H, W, mask_ptr, count, stride_b, stride_h, stride_w, BLOCK: tl.constexpr):
    """Offsets of channel 0 of a block of pixels in a tensor of any layout, and which of them are hidden."""
    pixels = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    hidden = tl.load(mask_ptr + pixels, mask=pixels < count, other=0) != 0
    rows = pixels // W
    return (rows // H) * stride_b + (rows % H) * stride_h + (pixels % W) * stride_w, hidden, pixels


@triton.jit
def _masked_mse_fwd_kernel(
    prediction_ptr,
    target_ptr,
    mask_ptr,
    sums_ptr,
    counts_ptr,
    count,
    H,
    W,
    p_b,
    p_c,
    p_h,
    p_w,
    t_b,
    t_c,
    t_h,
    t_w,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of squares and hidden pixels of one block. Reads the hidden pixels of both images and the mask once."""
    p_offsets, hidden, _ = _offsets(H, W, mask_ptr, count, p_b, p_h, p_w, BLOCK)
    t_offsets, _, _ = _offsets(H, W, mask_ptr, count, t_b, t_h, t_w, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(CHANNELS):
        p = tl.load(prediction_ptr + p_offsets + c * p_c, mask=hidden, other=0.0).to(tl.float32)
        t = tl.load(target_ptr + t_offsets + c * t_c, mask=hidden, other=0.0).to(tl.float32)
        total += (p - t) * (p - t)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))
    tl.store(counts_ptr + tl.program_id(0), tl.sum(hidden.to(tl.int32), axis=0))


@triton.jit
def _masked_mse_bwd_kernel(
    prediction_ptr,
    target_ptr,
    mask_ptr,
    factor_ptr,
    grad_ptr,
    count,
    H,
    W,
    p_b,
    p_c,
    p_h,
    p_w,
    t_b,
    t_c,
    t_h,
    t_w,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad = factor (prediction - target) at hidden pixels, 0 elsewhere; grad has the strides of prediction."""
    p_offsets, hidden, pixels = _offsets(H, W, mask_ptr, count, p_b, p_h, p_w, BLOCK)
    t_offsets, _, _ = _offsets(H, W, mask_ptr, count, t_b, t_h, t_w, BLOCK)
    factor = tl.load(factor_ptr)
    for c in tl.static_range(CHANNELS):
        p = tl.load(prediction_ptr + p_offsets + c * p_c, mask=hidden, other=0.0).to(tl.float32)
        t = tl.load(target_ptr + t_offsets + c * t_c, mask=hidden, other=0.0).to(tl.float32)
        grad = tl.where(hidden, factor * (p - t), 0.0)
        tl.store(grad_ptr + p_offsets + c * p_c, grad.to(grad_ptr.dtype.element_ty), mask=pixels < count)


def masked_mse_fwd(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the number of hidden values.

    Args:
        prediction: [B, C, H, W] float16, bfloat16 or float32, any layout.
        target: [B, C, H, W], any layout.
        mask: [B, 1, H, W] bool, True: hidden.
    Returns:
        0-d float32 loss (0 where nothing is hidden) and 0-d float32 C N, at least 1.
    """
    _, channels, height, width = prediction.shape
    mask = mask.contiguous()
    blocks = max(1, triton.cdiv(mask.numel(), BLOCK))
    with runtime.on_device(prediction.device):
        sums = torch.empty(blocks, dtype=torch.float32, device=prediction.device)
        counts = torch.empty(blocks, dtype=torch.int32, device=prediction.device)
        _masked_mse_fwd_kernel[(blocks,)](
            prediction,
            target,
            mask,
            sums,
            counts,
            mask.numel(),
            height,
            width,
            *prediction.stride(),
            *target.stride(),
            CHANNELS=channels,
            BLOCK=BLOCK,
        )
        values = (channels * counts.sum()).clamp_(min=1).to(torch.float32)
        return sums.sum() / values, values


def masked_mse_bwd(grad_loss: Tensor, prediction: Tensor, target: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """Gradient in the prediction, in its dtype and layout; arguments and `values` as of `masked_mse_fwd`."""
    _, channels, height, width = prediction.shape
    mask = mask.contiguous()
    with runtime.on_device(prediction.device):
        grad = torch.empty_strided(
            prediction.shape, prediction.stride(), dtype=prediction.dtype, device=prediction.device
        )
        factor = 2.0 * grad_loss.to(torch.float32) / values
        _masked_mse_bwd_kernel[(max(1, triton.cdiv(mask.numel(), BLOCK)),)](
            prediction,
            target,
            mask,
            factor,
            grad,
            mask.numel(),
            height,
            width,
            *prediction.stride(),
            *target.stride(),
            CHANNELS=channels,
            BLOCK=BLOCK,
        )
    return grad
