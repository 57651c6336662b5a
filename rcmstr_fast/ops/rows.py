"""What the CPU computes over rows [N, C] in C++ (csrc/rows.h, csrc/norm_rows.h), with gradients.

A row is a place of a map: an active site of a masked layer, or any place of a dense one. A window has taps (places of
its kernel); a tap joins an output row with the input row that lies under it, if there is one. A convolution goes
through the taps: it gathers the input rows that the tap joins, multiplies them with the tap's matrix, and at the end
adds the products of each output row in the order of the taps. So rows that are not there cost nothing, and neither do
taps that meet nothing. The gradients of data and weight use the same pairs. Results do not depend on the number of
threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rcmstr_fast.ops import native

if TYPE_CHECKING:
    from rcmstr_fast.ops.masked.cpu import WindowTable

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_gather_rows = native.function("gather_rows")
_sum_rows, _max_rows, _max_rows_backward, _norm_rows, _norm_rows_backward = (
    native.for_dtypes(name, DTYPES)
    for name in ("sum_rows", "max_rows", "max_rows_backward", "norm_rows", "norm_rows_backward")
)


def addresses(*tensors: Tensor | None) -> list[int]:
    """Addresses of first elements, 0 for None: the extension takes memory as plain integers."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], zeros where index is below 0."""
    rows, index = rows.contiguous(), index.flatten()
    out = rows.new_empty(len(index), rows.shape[1])
    size = rows.shape[1] * rows.element_size()
    _gather_rows(rows.data_ptr(), index.data_ptr(), out.data_ptr(), len(index), size, torch.get_num_threads())
    return out


def sum_rows(rows: Tensor, table: Tensor) -> Tensor:
    """out[i] = sum over t of rows[table[i, t]], skipping entries below 0, in float32 at least."""
    out = rows.new_empty(len(table), rows.shape[1])
    _sum_rows[rows.dtype](
        rows.data_ptr(), table.data_ptr(), out.data_ptr(), *table.shape, rows.shape[1], torch.get_num_threads()
    )
    return out


def _products(rows: Tensor, matrices: Tensor, starts: list[int]) -> Tensor:
    """rows[starts[t]:starts[t + 1]] @ matrices[t] for every tap."""
    out = rows.new_empty(len(rows), matrices.shape[2])
    for tap, matrix in enumerate(matrices):
        here = slice(starts[tap], starts[tap + 1])
        torch.mm(rows[here], matrix, out=out[here])
    return out


def _columns(x: Tensor, table: WindowTable) -> Tensor:
    """[outputs, taps * C]: the inputs of each output row side by side."""
    return gather(x, table.table).view(table.outputs, table.taps * x.shape[1])


class _Convolution(torch.autograd.Function):
    """x [inputs, C] and weight [O, C, kh, kw] to [outputs, O]; the gradient of the weight goes to `full`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, full: Tensor, table: WindowTable) -> Tensor:
        ctx.table, ctx.columns = table, x.shape[1] < table.columns_below and not table.identity
        ctx.kernel = weight.shape[2:]
        if ctx.columns:
            matrix = weight.permute(0, 2, 3, 1).flatten(1)
            out = _columns(x, table) @ matrix.T
        else:
            matrix = weight.permute(2, 3, 0, 1).flatten(0, 1).contiguous()
            if table.identity:
                out = x @ matrix[0].T
            else:
                in_row, _, starts, of_output, _ = table.pairs
                out = sum_rows(_products(gather(x, in_row), matrix.mT, starts), of_output)
        ctx.save_for_backward(x, matrix)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, None]:
        x, matrix = ctx.saved_tensors
        run = _columns_backward if ctx.columns else _identity_backward if ctx.table.identity else _pairs_backward
        grad_x, grad_matrix = run(x, matrix, grad.contiguous(), ctx.table, ctx.needs_input_grad[0])
        height, width = ctx.kernel
        if ctx.columns:
            grad_weight = grad_matrix.unflatten(1, (height, width, x.shape[1])).permute(0, 3, 1, 2)
        else:
            grad_weight = grad_matrix.unflatten(0, (height, width)).permute(2, 3, 0, 1)
        return grad_x, None, grad_weight, None


def _columns_backward(
    x: Tensor, matrix: Tensor, grad: Tensor, table: WindowTable, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    grad_matrix = grad.T @ _columns(x, table)
    if not wanted:
        return None, grad_matrix
    return sum_rows((grad @ matrix).view(table.outputs * table.taps, x.shape[1]), table.of_input), grad_matrix


def _identity_backward(
    x: Tensor, matrix: Tensor, grad: Tensor, table: WindowTable, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    return grad @ matrix[0] if wanted else None, (grad.T @ x)[None]


def _pairs_backward(
    x: Tensor, matrix: Tensor, grad: Tensor, table: WindowTable, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    in_row, out_row, starts, _, of_input = table.pairs
    rows, grads = gather(x, in_row), gather(grad, out_row)
    grad_matrix = torch.empty_like(matrix)
    for tap in range(table.taps):
        here = slice(starts[tap], starts[tap + 1])
        torch.mm(grads[here].T, rows[here], out=grad_matrix[tap])
    return sum_rows(_products(grads, matrix, starts), of_input) if wanted else None, grad_matrix


class _MaxPool(torch.autograd.Function):
    """x [inputs, C] to [outputs, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: WindowTable) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(table.outputs, x.shape[1])
        which = torch.empty(out.shape, dtype=torch.int8)
        _max_rows[x.dtype](
            *addresses(x, table.table, out, which), *table.table.shape, x.shape[1], torch.get_num_threads()
        )
        ctx.table = table
        ctx.save_for_backward(which)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (which,), inverse, grad = ctx.saved_tensors, ctx.table.inverse, grad.contiguous()
        grad_x = grad.new_empty(len(inverse), grad.shape[1])
        _max_rows_backward[grad.dtype](
            *addresses(grad, which, inverse, grad_x), *inverse.shape, grad.shape[1], torch.get_num_threads()
        )
        return grad_x, None


def convolution(x: Tensor, weight: Tensor, full: Tensor, table: WindowTable) -> Tensor:
    """Convolve rows.

    Args:
        x: [inputs, C].
        weight: [O, C, kh, kw] in the dtype of x.
        full: like weight in any floating-point dtype; takes its gradient.
        table: of the window.
    Returns:
        [outputs, O] in the dtype of x.
    """
    with torch.autocast("cpu", enabled=False):
        return _Convolution.apply(x, weight, full, table)


def max_pool(x: Tensor, table: WindowTable) -> Tensor:
    """The largest of the inputs [inputs, C] under each window, [outputs, C]; 0 where there is none."""
    return _MaxPool.apply(x, table)


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
        _norm_rows[x.dtype](*addresses(*tensors), starts, x.shape[1], eps, relu, torch.get_num_threads())
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
        _norm_rows_backward[x.dtype](*addresses(*tensors), ctx.starts, x.shape[1], torch.get_num_threads())
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


def reasons(x: Tensor) -> list[str]:
    """Why the C++ functions for rows cannot work on x."""
    found = [] if x.device.type == "cpu" else [f"x must be on cpu, got {x.device}"]
    return found if x.dtype in DTYPES else [*found, f"x must be one of {DTYPES}, got {x.dtype}"]
