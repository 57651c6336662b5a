"""Mask tokens in place of hidden tokens, and positions."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import checks, reference, triton_backend
from rcmstr_fast.ops.dispatch import operation, register

_replace_tokens = operation("replace_tokens", reference.replace_tokens)
_NAME = "replace_tokens"


def replace_tokens(
    tokens: Tensor, mask_token: Tensor, position: Tensor, hidden: Tensor, *, backend: str | None = None
) -> Tensor:
    """Replace hidden tokens by one learned vector and add positions: where(hidden, mask_token, tokens) + position.

    Args:
        tokens: [B, N, C] floating point; hidden ones may hold anything, also NaN. Receives a gradient (0 if hidden).
        mask_token: [C] floating point; the learned vector. Receives a gradient.
        position: [N, C] floating point. No gradient.
        hidden: [B, N] bool.
        backend: None (automatic), "reference" or "triton".
    Returns:
        [B, N, C] in the wider dtype of tokens and position, whatever the autocast state.
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree.
    """
    checks.check_tensor(_NAME, "tokens", tokens, ("B", "N", "C"))
    batch, number, channels = tokens.shape
    checks.check_tensor(_NAME, "mask_token", mask_token, (channels,), like="tokens")
    checks.check_tensor(_NAME, "position", position, (number, channels), like="tokens")
    checks.check_tensor(_NAME, "hidden", hidden, (batch, number), "bool", like="tokens")
    checks.check_devices(_NAME, tokens=tokens, mask_token=mask_token, position=position, hidden=hidden)
    return _replace_tokens(tokens, mask_token, position, hidden, backend=backend)


@torch.library.custom_op("rcmstr_fast::replace_tokens", mutates_args=())
def _replace(tokens: Tensor, mask_token: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
    from rcmstr_fast.kernels.replace_tokens import replace_tokens_fwd

    return replace_tokens_fwd(tokens, mask_token, position, hidden)


@_replace.register_fake
def _(tokens, mask_token, position, hidden):  # type: ignore[no-untyped-def]
    return tokens.new_empty(tokens.shape, dtype=torch.promote_types(tokens.dtype, position.dtype))


@torch.library.custom_op("rcmstr_fast::replace_tokens_bwd", mutates_args=())
def _replace_bwd(grad: Tensor, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients in the tokens, of `dtype`, and in the mask token, float32."""
    from rcmstr_fast.kernels.replace_tokens import replace_tokens_bwd

    return replace_tokens_bwd(grad, hidden, dtype)


@_replace_bwd.register_fake
def _(grad, hidden, dtype):  # type: ignore[no-untyped-def]
    return grad.new_empty(grad.shape, dtype=dtype), grad.new_empty(grad.shape[2], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[3])
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    (hidden,) = ctx.saved_tensors
    grad_tokens, grad_mask_token = _replace_bwd(grad, hidden, ctx.dtypes[0])
    return grad_tokens, grad_mask_token.to(ctx.dtypes[1]), None, None


_replace.register_autograd(_backward, setup_context=_setup)


def _triton(tokens: Tensor, mask_token: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
    return _replace(tokens, mask_token, position.detach(), hidden)


def _reasons(tokens: Tensor, mask_token: Tensor, position: Tensor, hidden: Tensor) -> list[str]:
    return triton_backend.operand_reasons({"tokens": tokens, "mask_token": mask_token, "position": position})


register(
    _replace_tokens,
    "triton",
    _triton,
    unsupported_reasons=_reasons,
    available=triton_backend.reasons,
    avoid=triton_backend.avoid_on_cpu,
)
