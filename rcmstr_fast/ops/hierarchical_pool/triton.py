"""Triton backend of `hierarchical_pool` as a custom operator."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import triton_backend
from rcmstr_fast.ops.hierarchical_pool.reference import HierarchicalFeatures


@torch.library.custom_op("rcmstr_fast::hierarchical_pool", mutates_args=())
def _pool(frames: Tensor, num_subwords: int, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from rcmstr_fast.kernels.hierarchical_pool import hierarchical_pool_fwd

    frame, subword, word = hierarchical_pool_fwd(frames, num_subwords, order)
    return frames.new_empty(0) if frame is None else frame, subword, word


@_pool.register_fake
def _(frames, num_subwords, order):
    batch, _, channels = frames.shape
    frame = frames.new_empty(0) if order is None else frames.new_empty(frames.shape)
    return frame, frames.new_empty(batch, num_subwords, channels), frames.new_empty(batch, 1, channels)


@torch.library.custom_op("rcmstr_fast::hierarchical_pool_bwd", mutates_args=())
def _pool_bwd(grad_frame: Tensor, grad_subword: Tensor, grad_word: Tensor, order: Tensor | None) -> Tensor:
    from rcmstr_fast.kernels.hierarchical_pool import hierarchical_pool_bwd

    return hierarchical_pool_bwd(grad_frame, grad_subword, grad_word, order)


@_pool_bwd.register_fake
def _(grad_frame, grad_subword, grad_word, order):
    return grad_frame.new_empty(grad_frame.shape)


def _pool_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.frames = inputs[0].shape, inputs[0].dtype


def _pool_backward(ctx: Any, grad_frame: Tensor | None, grad_subword: Tensor, grad_word: Tensor) -> tuple:
    (order,) = ctx.saved_tensors
    shape, dtype = ctx.frames
    if order is None or grad_frame is None:  # without an order the frames bypass this operator
        grad_frame = grad_subword.new_zeros(shape, dtype=dtype)
    return _pool_bwd(grad_frame, grad_subword, grad_word, order), None, None


_pool.register_autograd(_pool_backward, setup_context=_pool_setup)


def hierarchical_pool(frames: Tensor, num_subwords: int, *, order: Tensor | None) -> HierarchicalFeatures:
    """The public operation on the kernel."""
    frame, subword, word = _pool(frames, num_subwords, order)
    return HierarchicalFeatures(frames if order is None else frame, subword, word)


def reasons(frames: Tensor, num_subwords: int, *, order: Tensor | None) -> list[str]:
    """Why the kernel cannot run the call."""
    found = triton_backend.operand_reasons({"frames": frames})
    return found + ([f"T must be at most 256, got {frames.shape[1]}"] if frames.shape[1] > 256 else [])
