"""The masked layers on a CPU: only the rows of active sites are stored and computed.

A map [B, C, h, w] with N active sites is held as rows [N, C] in the order of the sites. A window has taps (places of
its kernel); a tap joins an output row with the input row that lies under it, if that site is active. A convolution goes
through the taps: it gathers the input rows that the tap joins, multiplies them with the tap's matrix, and at the end
adds the products of each output row in the order of the taps. So hidden rows cost nothing, and neither do taps that
meet nothing. The gradients of data and weight use the same pairs. Results do not depend on the number of threads. The
lists and everything but the products are C++ (csrc/sites.h, csrc/rows.h).
"""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import native
from rcmstr_fast.ops.batch_norm.cpu import DTYPES, norm_rows, row_reasons
from rcmstr_fast.ops.masked.layers import Layer, operands
from rcmstr_fast.ops.masked.reference import CastWeight
from rcmstr_fast.ops.masked.rows import RowSites, WindowTable
from rcmstr_fast.tuning import choices
from rcmstr_fast.tuning.choices import Choice

#: Below this many input channels one product over all taps beats one a tap: the rows are too short to gather in pairs.
_COLUMNS_BELOW = 32
_COLUMNS = choices.declare(
    Choice(
        "masked.columns",
        "input channels below which packed convolutions multiply all taps at once",
        "masked_pass",
        1.05,
        lambda setting: [_COLUMNS_BELOW, 16, 64] if setting.device == "cpu" and setting.stages else [],
        lambda setting: _COLUMNS_BELOW,
    )
)


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], zeros where index is below 0."""
    rows, index = rows.contiguous(), index.flatten()
    out = rows.new_empty(len(index), rows.shape[1])
    size = rows.shape[1] * rows.element_size()
    native.function("gather_rows")(
        rows.data_ptr(), index.data_ptr(), out.data_ptr(), len(index), size, torch.get_num_threads()
    )
    return out


def sum_rows(rows: Tensor, table: Tensor) -> Tensor:
    """out[i] = sum over t of rows[table[i, t]], skipping entries below 0, in float32 at least."""
    out = rows.new_empty(len(table), rows.shape[1])
    native.function("sum_rows", rows.dtype)(
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
        below = choices.value(_COLUMNS.name) or _COLUMNS_BELOW
        ctx.table, ctx.columns = table, x.shape[1] < below and not table.identity
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
        native.function("max_rows", x.dtype)(
            *map(native.address, (x, table.table, out, which)), *table.table.shape, x.shape[1], torch.get_num_threads()
        )
        ctx.table = table
        ctx.save_for_backward(which)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (which,), inverse, grad = ctx.saved_tensors, ctx.table.inverse, grad.contiguous()
        grad_x = grad.new_empty(len(inverse), grad.shape[1])
        native.function("max_rows_backward", grad.dtype)(
            *map(native.address, (grad, which, inverse, grad_x)), *inverse.shape, grad.shape[1], torch.get_num_threads()
        )
        return grad_x, None


def convolution(x: Tensor, weight: Tensor | CastWeight, table: WindowTable) -> Tensor:
    """Rows [inputs, C] to [outputs, O]; autocast applies as in `conv2d`."""
    arguments = operands(x, weight)
    with torch.autocast("cpu", enabled=False):
        return _Convolution.apply(*arguments, table)


def masked_layer(layer: Layer) -> Tensor:
    """A masked layer on rows; gives rows where the storage keeps them, else a map."""
    sites, window, norm = RowSites.of(layer.sites), layer.window, layer.norm
    x = sites.take_in(layer.x, window)
    if window is not None:
        table = sites.of_window(layer.x, window)
        x = _MaxPool.apply(x, table) if layer.weight is None else convolution(x, layer.weight, table)
    if norm is not None:
        residual = None if norm.residual is None else sites.take_in(norm.residual, None)
        starts = sites.rows.group_starts(norm.group_size)
        x = norm_rows(x, norm.weight, norm.bias, starts, norm.eps, residual, norm.relu)[0]
    return x if sites.kept else sites.give_out(x)


def reasons(layer: Layer) -> list[str]:
    """Why C++ cannot compute the layer."""
    found = row_reasons(layer.x)
    dtype = torch.get_autocast_dtype("cpu")
    if torch.is_autocast_enabled("cpu") and dtype not in DTYPES:
        found.append(f"autocast must be to one of {DTYPES}, got {dtype}")
    return found
