"""Triton backend of `grouped_batch_norm` as a custom operator."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import triton_backend
from rcmstr_fast.ops.batch_norm.reference import GroupedNorm, group_rows, group_sizes


def _rows_in_memory(x: Tensor) -> Tensor:
    """x with its channels side by side in memory, as the kernels read it."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


@torch.library.custom_op("rcmstr_fast::grouped_batch_norm", mutates_args=())
def _norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    passes: int,
    group_size: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, mean, rstd and unbiased variance."""
    from rcmstr_fast.kernels.batch_norm import Groups, batch_norm_fwd

    x = _rows_in_memory(x)
    out = torch.empty_like(x)
    groups = Groups(group_rows(x, passes, group_size), passes, len(weight), x.device)
    residual = None if residual is None else _rows_in_memory(residual)
    mean, rstd, var = batch_norm_fwd(x, (weight, bias), residual, out, groups, eps, relu)
    return out, mean, rstd, var


@_norm.register_fake
def _(x, weight, bias, residual, passes, group_size, eps, relu):
    number = passes * len(group_sizes(x.shape[0] // passes, group_size))
    mean, rstd, var = (weight.new_empty(number, len(weight)) for _ in range(3))
    return torch.empty_like(_rows_in_memory(x)), mean, rstd, var


@torch.library.custom_op("rcmstr_fast::grouped_batch_norm_bwd", mutates_args=())
def _norm_bwd(
    grad: Tensor, x: Tensor, out: Tensor, saved: list[Tensor], passes: int, group_size: int, relu: bool, added: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the residual (empty without one), weight and bias; `saved`: weight, bias, mean, rstd."""
    from rcmstr_fast.kernels.batch_norm import Groups, batch_norm_bwd

    weight, bias, mean, rstd = saved
    x, grad = _rows_in_memory(x), _rows_in_memory(grad)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if added else None
    groups = Groups(group_rows(x, passes, group_size), passes, len(weight), x.device)
    grad_weight, grad_bias = batch_norm_bwd(
        grad, x, out, (weight, bias), (mean, rstd), (grad_x, grad_residual), groups, relu
    )
    residual = x.new_empty(0) if grad_residual is None else grad_residual
    return grad_x, residual, grad_weight.clone(), grad_bias.clone()


@_norm_bwd.register_fake
def _(grad, x, out, saved, passes, group_size, relu, added):
    grad_x, residual = (torch.empty_like(_rows_in_memory(x)) for _ in range(2))
    return grad_x, residual if added else x.new_empty(0), torch.empty_like(saved[0]), torch.empty_like(saved[1])


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, residual, ctx.passes, ctx.group_size, _, ctx.relu = inputs
    ctx.added = residual is not None
    # The backward finds the sign of the ReLU again from x; only with a residual it must look at the result.
    ctx.save_for_backward(x, output[0] if ctx.relu and ctx.added else x, weight, bias, output[1], output[2])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    x, out, *saved = ctx.saved_tensors
    grads = _norm_bwd(grad, x, out, saved, ctx.passes, ctx.group_size, ctx.relu, ctx.added)
    return grads[0], grads[2], grads[3], grads[1] if ctx.added else None, None, None, None, None


_norm.register_autograd(_backward, setup_context=_setup)


def grouped_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    passes: int,
    group_size: int,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> GroupedNorm:
    """The public operation on the kernels."""
    residual = None if residual is None else residual.to(x.dtype)
    out, mean, _, var = _norm(x, weight.float(), bias.float(), residual, passes, group_size, eps, relu)
    return GroupedNorm(out, mean, var)


def reasons(x: Tensor, *_: Any, **__: Any) -> list[str]:
    """Why the kernels cannot run the call."""
    return triton_backend.operand_reasons({"x": x}) + ([] if x.numel() else ["x must not be empty"])
