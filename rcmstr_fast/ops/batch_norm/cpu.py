"""Batch norm on a CPU in C++ (csrc/norm_rows.cpp) over rows [N, C]: dense maps whose channels lie side by side, and
packed rows.

One pass over the rows takes the statistics, a second one normalises, adds the residual and applies ReLU.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import native
from rcmstr_fast.ops.batch_norm.reference import GroupedNorm, group_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class _NormRows(torch.autograd.Function):
    """x, residual [N, C], weight, bias [C] to [N, C], mean and unbiased variance [groups, C] of each group of rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        starts: list[int],
        eps: float,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        residual = None if residual is None else residual.contiguous()
        mean, rstd, var = weight.new_zeros(3, len(starts) - 1, x.shape[1])
        tensors = (x, weight.contiguous(), bias.contiguous(), residual, out, mean, rstd, var)
        native.function("norm_rows", x.dtype)(
            *map(native.address, tensors), starts, x.shape[1], eps, relu, torch.get_num_threads()
        )
        ctx.starts, ctx.relu, ctx.added = starts, relu, residual is not None
        ctx.save_for_backward(x, weight, mean, rstd, *([out] if relu else []))
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, *out = ctx.saved_tensors
        grad, weight = grad.contiguous(), weight.contiguous()
        grad_x, (grad_weight, grad_bias) = torch.empty_like(x), weight.new_empty(2, len(weight))
        grad_residual = torch.empty_like(x) if ctx.added else None
        result = out[0] if ctx.relu else None
        tensors = (grad, x, result, weight, mean, rstd, grad_x, grad_residual, grad_weight, grad_bias)
        native.function("norm_rows_backward", x.dtype)(
            *map(native.address, tensors), ctx.starts, x.shape[1], torch.get_num_threads()
        )
        return grad_x, grad_residual, grad_weight, grad_bias, None, None, None


def norm_rows(
    x: Tensor, weight: Tensor, bias: Tensor, starts: list[int], eps: float, residual: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise rows group by group, in float32 at least.

    Args:
        x: [N, C], one of `DTYPES`.
        weight: [C].
        bias: [C].
        starts: first row of each group, then N.
        eps: added to the variance.
        residual: [N, C] or None; added before ReLU.
        relu: apply ReLU.
    Returns:
        Rows [N, C] like x, mean and unbiased variance [groups, C].
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    residual = None if residual is None else residual.to(x.dtype)
    return _NormRows.apply(x, residual, weight.to(dtype), bias.to(dtype), starts, eps, relu)


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
    """The public operation in C++."""

    def rows(y: Tensor) -> Tensor:
        return (y.movedim(1, -1) if y.dim() == 4 else y).reshape(-1, len(weight))

    starts = list(accumulate(group_rows(x, passes, group_size) * passes, initial=0))
    added = None if residual is None else rows(residual)
    out, mean, var = norm_rows(rows(x), weight, bias, starts, eps, added, relu)
    if x.dim() != 4:
        return GroupedNorm(out.view(x.shape), mean, var)
    return GroupedNorm(out.view(x.shape[0], *x.shape[2:], len(weight)).movedim(-1, 1), mean, var)


def row_reasons(x: Tensor) -> list[str]:
    """Why the C++ functions for rows cannot work on x."""
    found = [] if x.device.type == "cpu" else [f"x must be on cpu, got {x.device}"]
    return found if x.dtype in DTYPES else [*found, f"x must be one of {DTYPES}, got {x.dtype}"]


def reasons(x: Tensor, *_: Any, **__: Any) -> list[str]:
    """Why C++ cannot run the call."""
    found = row_reasons(x)
    if torch.compiler.is_compiling():
        found.append("its C++ functions are opaque to torch.compile")
    return found + ([] if x.numel() else ["x must not be empty"])


def avoid(x: Tensor, *_: Any, **__: Any) -> list[str]:
    """Why the automatic choice passes over C++: other layouts would have to be copied first."""
    rows = x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.is_contiguous()
    return [] if rows else ["the channels of x do not lie side by side in memory"]
