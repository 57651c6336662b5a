"""Triton backend of `replace_tokens` as a custom operator."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import triton_backend


@torch.library.custom_op("rcmstr_fast::replace_tokens", mutates_args=())
def _replace(tokens: Tensor, mask_token: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
    from rcmstr_fast.kernels.replace_tokens import replace_tokens_fwd

    return replace_tokens_fwd(tokens, mask_token, position, hidden)


@_replace.register_fake
def _(tokens, mask_token, position, hidden):
    return tokens.new_empty(tokens.shape, dtype=torch.promote_types(tokens.dtype, position.dtype))


@torch.library.custom_op("rcmstr_fast::replace_tokens_bwd", mutates_args=())
def _replace_bwd(grad: Tensor, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients in the tokens, of `dtype`, and in the mask token, float32."""
    from rcmstr_fast.kernels.replace_tokens import replace_tokens_bwd

    return replace_tokens_bwd(grad, hidden, dtype)


@_replace_bwd.register_fake
def _(grad, hidden, dtype):
    return grad.new_empty(grad.shape, dtype=dtype), grad.new_empty(grad.shape[2], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[3])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    (hidden,) = ctx.saved_tensors
    grad_tokens, grad_mask_token = _replace_bwd(grad, hidden, ctx.dtypes[0])
    return grad_tokens, grad_mask_token.to(ctx.dtypes[1]), None, None


_replace.register_autograd(_backward, setup_context=_setup)


def replace_tokens(tokens: Tensor, mask_token: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
    """The public operation on the kernel."""
    return _replace(tokens, mask_token, position.detach(), hidden)


def reasons(tokens: Tensor, mask_token: Tensor, position: Tensor, hidden: Tensor) -> list[str]:
    """Why the kernel cannot run the call."""
    return triton_backend.operand_reasons({"tokens": tokens, "mask_token": mask_token, "position": position})
