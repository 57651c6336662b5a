"""Triton backend of `masked_mse` as a custom operator."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import triton_backend


@torch.library.custom_op("rcmstr_fast::masked_mse", mutates_args=())
def _mse(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    from rcmstr_fast.kernels.masked_mse import masked_mse_fwd

    return masked_mse_fwd(prediction, target, mask)


@_mse.register_fake
def _(prediction, target, mask):
    loss, values = (prediction.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, values


@torch.library.custom_op("rcmstr_fast::masked_mse_bwd", mutates_args=())
def _mse_bwd(grad_loss: Tensor, prediction: Tensor, target: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    from rcmstr_fast.kernels.masked_mse import masked_mse_bwd

    return masked_mse_bwd(grad_loss, prediction, target, mask, values)


@_mse_bwd.register_fake
def _(grad_loss, prediction, target, mask, values):
    return torch.empty_strided(prediction.shape, prediction.stride(), dtype=prediction.dtype, device=prediction.device)


def _mse_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _mse_backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple:
    return _mse_bwd(grad_loss, *ctx.saved_tensors), None, None


_mse.register_autograd(_mse_backward, setup_context=_mse_setup)


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The public operation on the kernel."""
    return _mse(prediction, target.detach(), mask)[0]


def reasons(prediction: Tensor, target: Tensor, mask: Tensor) -> list[str]:
    """Why the kernel cannot run the call."""
    found = triton_backend.operand_reasons({"prediction": prediction, "target": target})
    overlaps = any(s == 0 and n > 1 for s, n in zip(prediction.stride(), prediction.shape))
    return found + (["prediction must not be expanded"] if overlaps else [])
