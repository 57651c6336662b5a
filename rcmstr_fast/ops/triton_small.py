"""Triton backends of `hierarchical_pool`, `masked_mse` and `enqueue_` as custom operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import triton_backend
from rcmstr_fast.ops.dispatch import Operation, register
from rcmstr_fast.ops.reference import HierarchicalFeatures


@torch.library.custom_op("rcmstr_fast::hierarchical_pool", mutates_args=())
def _pool(frames: Tensor, num_subwords: int, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    from rcmstr_fast.kernels.hierarchical_pool import hierarchical_pool_fwd

    frame, subword, word = hierarchical_pool_fwd(frames, num_subwords, order)
    return frames.new_empty(0) if frame is None else frame, subword, word


@_pool.register_fake
def _(frames, num_subwords, order):  # type: ignore[no-untyped-def]
    batch, _, channels = frames.shape
    frame = frames.new_empty(0) if order is None else frames.new_empty(frames.shape)
    return frame, frames.new_empty(batch, num_subwords, channels), frames.new_empty(batch, 1, channels)


@torch.library.custom_op("rcmstr_fast::hierarchical_pool_bwd", mutates_args=())
def _pool_bwd(grad_frame: Tensor, grad_subword: Tensor, grad_word: Tensor, order: Tensor | None) -> Tensor:
    from rcmstr_fast.kernels.hierarchical_pool import hierarchical_pool_bwd

    return hierarchical_pool_bwd(grad_frame, grad_subword, grad_word, order)


@_pool_bwd.register_fake
def _(grad_frame, grad_subword, grad_word, order):  # type: ignore[no-untyped-def]
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


def _hierarchical_pool(frames: Tensor, num_subwords: int, *, order: Tensor | None) -> HierarchicalFeatures:
    frame, subword, word = _pool(frames, num_subwords, order)
    return HierarchicalFeatures(frames if order is None else frame, subword, word)


@torch.library.custom_op("rcmstr_fast::masked_mse", mutates_args=())
def _mse(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    from rcmstr_fast.kernels.masked_mse import masked_mse_fwd

    return masked_mse_fwd(prediction, target, mask)


@_mse.register_fake
def _(prediction, target, mask):  # type: ignore[no-untyped-def]
    loss, values = (prediction.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, values


@torch.library.custom_op("rcmstr_fast::masked_mse_bwd", mutates_args=())
def _mse_bwd(grad_loss: Tensor, prediction: Tensor, target: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    from rcmstr_fast.kernels.masked_mse import masked_mse_bwd

    return masked_mse_bwd(grad_loss, prediction, target, mask, values)


@_mse_bwd.register_fake
def _(grad_loss, prediction, target, mask, values):  # type: ignore[no-untyped-def]
    return torch.empty_strided(prediction.shape, prediction.stride(), dtype=prediction.dtype, device=prediction.device)


def _mse_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _mse_backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple:
    return _mse_bwd(grad_loss, *ctx.saved_tensors), None, None


_mse.register_autograd(_mse_backward, setup_context=_mse_setup)


def _masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return _mse(prediction, target.detach(), mask)[0]


@torch.library.custom_op("rcmstr_fast::enqueue_", mutates_args=("queue", "pointer"))
def _enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    from rcmstr_fast.kernels.queue import enqueue_

    enqueue_(queue, pointer, keys)


@_enqueue_.register_fake
def _(queue, pointer, keys):  # type: ignore[no-untyped-def]
    return None


def _enqueue_detached(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    _enqueue_(queue, pointer, keys.detach())


def _pool_reasons(frames: Tensor, num_subwords: int, *, order: Tensor | None) -> list[str]:
    reasons = triton_backend.operand_reasons({"frames": frames})
    return reasons + ([f"T must be at most 256, got {frames.shape[1]}"] if frames.shape[1] > 256 else [])


def _mse_reasons(prediction: Tensor, target: Tensor, mask: Tensor) -> list[str]:
    reasons = triton_backend.operand_reasons({"prediction": prediction, "target": target})
    overlaps = any(s == 0 and n > 1 for s, n in zip(prediction.stride(), prediction.shape))
    return reasons + (["prediction must not be expanded"] if overlaps else [])


def _enqueue_reasons(queue: Tensor, pointer: Tensor, keys: Tensor) -> list[str]:
    reasons = triton_backend.operand_reasons({"queue": queue, "keys": keys})
    reasons += [] if queue.is_contiguous() else ["queue must be contiguous"]
    return reasons + ([f"D must be at most 4096, got {queue.shape[1]}"] if queue.shape[1] > 4096 else [])


_TRITON: dict[str, tuple[Callable[..., Any], Callable[..., list[str]]]] = {
    "hierarchical_pool": (_hierarchical_pool, _pool_reasons),
    "masked_mse": (_masked_mse, _mse_reasons),
    "enqueue_": (_enqueue_detached, _enqueue_reasons),
}


def register_triton(op: Operation) -> None:
    """Register the Triton backend of one of these operations."""
    run, unsupported_reasons = _TRITON[op.name]
    register(
        op,
        "triton",
        run,
        unsupported_reasons=unsupported_reasons,
        available=triton_backend.reasons,
        avoid=triton_backend.avoid_on_cpu,
    )
