"""Frame, subword and word features of a sequence, undoing a strip permutation on the way.

One program holds all T frames of one image for a block of channels: it gathers them through the inverse order,
writes them back in order, and averages the S windows floor(s T / S) .. ceil((s + 1) T / S) and the whole. The
backward program of the same shape adds the three gradients a frame and writes to where the frame came from.
Sums in fp32; every frame is read once and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import runtime


@triton.jit
def _sources(place_ptr, image, t, T: tl.constexpr, STRIPS: tl.constexpr):
    """Row of the flat [B T] frames in which frame t of an image is found."""
    if STRIPS == 0:
        return image * T + t
    else:
        STEP: tl.constexpr = T // STRIPS
        place = tl.load(place_ptr + image * STRIPS + t // STEP, mask=t < T, other=0)
        return place * STEP + t % STEP


@triton.jit
def _window(t, s: tl.constexpr, T: tl.constexpr, S: tl.constexpr):
    """Which frames [BLOCK_T, 1] belong to subword s, and how many they are."""
    START: tl.constexpr = s * T // S
    END: tl.constexpr = ((s + 1) * T + S - 1) // S
    return ((t >= START) & (t < END))[:, None], END - START


@triton.jit
def _hierarchical_pool_fwd_kernel(
    frames_ptr,
    place_ptr,
    frame_ptr,
    subword_ptr,
    word_ptr,
    C,
    T: tl.constexpr,
    S: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: images, channel blocks. `frame` is written only where STRIPS > 0 (else it is the input itself)."""
    image = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (t < T)[:, None] & (c < C)[None, :]
    rows = _sources(place_ptr, image, t, T, STRIPS)
    values = tl.load(frames_ptr + rows[:, None] * C + c[None, :], mask=mask, other=0.0)
    if STRIPS > 0:
        tl.store(frame_ptr + (image * T + t)[:, None] * C + c[None, :], values, mask=mask)
    x = values.to(tl.float32)
    tl.store(word_ptr + image * C + c, tl.sum(x, axis=0) / T, mask=c < C)
    for s in tl.static_range(S):
        inside, length = _window(t, s, T, S)
        total = tl.sum(tl.where(inside, x, 0.0), axis=0)
        tl.store(subword_ptr + (image * S + s) * C + c, total / length, mask=c < C)


@triton.jit
def _hierarchical_pool_bwd_kernel(
    grad_frame_ptr,
    grad_subword_ptr,
    grad_word_ptr,
    place_ptr,
    grad_ptr,
    C,
    T: tl.constexpr,
    S: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient in the frames as they were given (grid: images, channel blocks)."""
    image = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (t < T)[:, None] & (c < C)[None, :]
    here = (image * T + t)[:, None] * C + c[None, :]
    grad = tl.load(grad_frame_ptr + here, mask=mask, other=0.0).to(tl.float32)
    grad += (tl.load(grad_word_ptr + image * C + c, mask=c < C, other=0.0).to(tl.float32) / T)[None, :]
    for s in tl.static_range(S):
        inside, length = _window(t, s, T, S)
        part = tl.load(grad_subword_ptr + (image * S + s) * C + c, mask=c < C, other=0.0).to(tl.float32)
        grad += tl.where(inside, (part / length)[None, :], 0.0)
    rows = _sources(place_ptr, image, t, T, STRIPS)
    tl.store(grad_ptr + rows[:, None] * C + c[None, :], grad.to(grad_ptr.dtype.element_ty), mask=mask)


def _inverse(order: Tensor) -> Tensor:
    """Where each strip is shown: place[order[i]] = i."""
    order = order.reshape(-1)
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def _shape(frames: Tensor, num_subwords: int, order: Tensor | None) -> dict[str, int]:
    block_t = triton.next_power_of_2(frames.shape[1])
    block_c = max(16, min(128, 2048 // block_t))
    strips = 0 if order is None else order.shape[1]
    return {"T": frames.shape[1], "S": num_subwords, "STRIPS": strips, "BLOCK_T": block_t, "BLOCK_C": block_c}


def hierarchical_pool_fwd(
    frames: Tensor, num_subwords: int, order: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Features of the three levels.

    Args:
        frames: [B, T, C] float16, bfloat16 or float32.
        num_subwords: S.
        order: [B, N] int64 permutation of the batch's strips, or None.
    Returns:
        [B, T, C] in order (None without `order`: it is `frames`), [B, S, C], [B, 1, C] in the dtype of `frames`.
    """
    frames = frames.contiguous()
    batch, _, channels = frames.shape
    sizes = _shape(frames, num_subwords, order)
    subword, word = frames.new_empty(batch, num_subwords, channels), frames.new_empty(batch, 1, channels)
    frame = None if order is None else torch.empty_like(frames)
    if frames.numel():
        with runtime.on_device(frames.device):
            place = frames if order is None else _inverse(order)
            _hierarchical_pool_fwd_kernel[(batch, triton.cdiv(channels, sizes["BLOCK_C"]))](
                frames, place, frames if frame is None else frame, subword, word, channels, **sizes
            )
    return frame, subword, word


def hierarchical_pool_bwd(grad_frame: Tensor, grad_subword: Tensor, grad_word: Tensor, order: Tensor | None) -> Tensor:
    """Gradient in the frames: [B, T, C], dtype of `grad_frame`; arguments as the results of the forward."""
    grad_frame, grad_subword, grad_word = grad_frame.contiguous(), grad_subword.contiguous(), grad_word.contiguous()
    grad = torch.empty_like(grad_frame)
    sizes = _shape(grad_frame, grad_subword.shape[1], order)
    batch, _, channels = grad_frame.shape
    if grad.numel():
        with runtime.on_device(grad.device):
            place = grad_frame if order is None else _inverse(order)
            _hierarchical_pool_bwd_kernel[(batch, triton.cdiv(channels, sizes["BLOCK_C"]))](
                grad_frame, grad_subword, grad_word, place, grad, channels, **sizes
            )
    return grad
