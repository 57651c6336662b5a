"""The masked layers on packed rows: only active sites are stored and computed (CPU).

A map [B, C, h, w] with N active sites is held as rows [N, C] in the order of the sites. A convolution gathers, a tap,
the pairs (input row, output row) that the tap joins, multiplies them with the tap's matrix, and adds each output row's
products in the order of the taps; hidden rows and dead taps cost nothing. Data and weight gradients use the same
lists. Results do not depend on the number of threads. The lists and everything but the products are C++ (csrc/sites.h,
csrc/rows.h).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops.dispatch import Operation, register
from rcmstr_fast.ops.reference import CastWeight, Sites
from rcmstr_fast.ops.reference.cast_weight import operands
from rcmstr_fast.ops.site_rows import RowList, Window, WindowLists, native, reasons

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: Below this many input channels one product over all taps beats one a tap: the rows are too short to gather in pairs.
_COLUMNS_BELOW = 32


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], zeros where index is below 0."""
    rows, index = rows.contiguous(), index.flatten()
    out = rows.new_empty(len(index), rows.shape[1])
    size = rows.shape[1] * rows.element_size()
    native("gather_rows")(rows.data_ptr(), index.data_ptr(), out.data_ptr(), len(index), size, torch.get_num_threads())
    return out


def sum_rows(rows: Tensor, table: Tensor) -> Tensor:
    """out[i] = sum over t of rows[table[i, t]], skipping entries below 0, in float32 at least."""
    out = rows.new_empty(len(table), rows.shape[1])
    native("sum_rows", rows.dtype)(
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


def _columns(x: Tensor, lists: WindowLists) -> Tensor:
    """[outputs, taps * C]: the inputs of each output row side by side."""
    return gather(x, lists.table).view(lists.outputs, lists.taps * x.shape[1])


class _Convolution(torch.autograd.Function):
    """x [inputs, C] and weight [O, C, kh, kw] to [outputs, O]; the gradient of the weight goes to `full`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, full: Tensor, lists: WindowLists) -> Tensor:
        ctx.lists, ctx.columns = lists, x.shape[1] < _COLUMNS_BELOW and not lists.identity
        ctx.kernel = weight.shape[2:]
        if ctx.columns:
            matrix = weight.permute(0, 2, 3, 1).flatten(1)
            out = _columns(x, lists) @ matrix.T
        else:
            matrix = weight.permute(2, 3, 0, 1).flatten(0, 1).contiguous()
            if lists.identity:
                out = x @ matrix[0].T
            else:
                in_row, _, starts, of_output, _ = lists.pairs
                out = sum_rows(_products(gather(x, in_row), matrix.mT, starts), of_output)
        ctx.save_for_backward(x, matrix)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, None]:
        x, matrix = ctx.saved_tensors
        run = _columns_backward if ctx.columns else _identity_backward if ctx.lists.identity else _pairs_backward
        grad_x, grad_matrix = run(x, matrix, grad.contiguous(), ctx.lists, ctx.needs_input_grad[0])
        height, width = ctx.kernel
        if ctx.columns:
            grad_weight = grad_matrix.unflatten(1, (height, width, x.shape[1])).permute(0, 3, 1, 2)
        else:
            grad_weight = grad_matrix.unflatten(0, (height, width)).permute(2, 3, 0, 1)
        return grad_x, None, grad_weight, None


def _columns_backward(
    x: Tensor, matrix: Tensor, grad: Tensor, lists: WindowLists, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    grad_matrix = grad.T @ _columns(x, lists)
    if not wanted:
        return None, grad_matrix
    return sum_rows((grad @ matrix).view(lists.outputs * lists.taps, x.shape[1]), lists.of_input), grad_matrix


def _identity_backward(
    x: Tensor, matrix: Tensor, grad: Tensor, lists: WindowLists, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    return grad @ matrix[0] if wanted else None, (grad.T @ x)[None]


def _pairs_backward(
    x: Tensor, matrix: Tensor, grad: Tensor, lists: WindowLists, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    in_row, out_row, starts, _, of_input = lists.pairs
    rows, grads = gather(x, in_row), gather(grad, out_row)
    grad_matrix = torch.empty_like(matrix)
    for tap in range(lists.taps):
        here = slice(starts[tap], starts[tap + 1])
        torch.mm(grads[here].T, rows[here], out=grad_matrix[tap])
    return sum_rows(_products(grads, matrix, starts), of_input) if wanted else None, grad_matrix


class _MaxPool(torch.autograd.Function):
    """x [inputs, C] to [outputs, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lists: WindowLists) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(lists.outputs, x.shape[1])
        which = torch.empty(out.shape, dtype=torch.int8)
        native("max_rows", x.dtype)(
            x.data_ptr(), lists.table.data_ptr(), out.data_ptr(), which.data_ptr(), *lists.table.shape, x.shape[1],
            torch.get_num_threads(),
        )  # fmt: skip
        ctx.lists = lists
        ctx.save_for_backward(which)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (which,), inverse, grad = ctx.saved_tensors, ctx.lists.inverse, grad.contiguous()
        grad_x = grad.new_empty(len(inverse), grad.shape[1])
        native("max_rows_backward", grad.dtype)(
            grad.data_ptr(), which.data_ptr(), inverse.data_ptr(), grad_x.data_ptr(), *inverse.shape, grad.shape[1],
            torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, None


class _BatchNorm(torch.autograd.Function):
    """x, residual [N, C], weight, bias [C] to [N, C], mean and unbiased variance [groups, C] of each group of rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, starts: list[int], eps: float,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        residual = None if residual is None else residual.contiguous()
        mean, rstd, var = weight.new_zeros(3, len(starts) - 1, x.shape[1])
        native("norm_rows", x.dtype)(
            x.data_ptr(), weight.contiguous().data_ptr(), bias.contiguous().data_ptr(),
            0 if residual is None else residual.data_ptr(), out.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
            var.data_ptr(), starts, x.shape[1], eps, relu, torch.get_num_threads(),
        )  # fmt: skip
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
        native("norm_rows_backward", x.dtype)(
            grad.data_ptr(), x.data_ptr(), out[0].data_ptr() if out else 0, weight.data_ptr(), mean.data_ptr(),
            rstd.data_ptr(), grad_x.data_ptr(), grad_residual.data_ptr() if grad_residual is not None else 0,
            grad_weight.data_ptr(), grad_bias.data_ptr(), ctx.starts, x.shape[1], torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_residual, grad_weight, grad_bias, None, None, None


def convolution(x: Tensor, weight: Tensor | CastWeight, lists: WindowLists) -> Tensor:
    """Rows [inputs, C] to [outputs, O]; autocast applies as in `conv2d`."""
    arguments = operands(x, weight)
    with torch.autocast("cpu", enabled=False):
        return _Convolution.apply(*arguments, lists)


def max_pool(x: Tensor, lists: WindowLists) -> Tensor:
    """Rows [inputs, C] to [outputs, C]: the largest input of each window."""
    return _MaxPool.apply(x, lists)


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, starts: list[int], eps: float, residual: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [N, C] normalised a group of rows, mean and unbiased variance [groups, C]; arithmetic in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    residual = None if residual is None else residual.to(x.dtype)
    return _BatchNorm.apply(x, residual, weight.to(dtype), bias.to(dtype), starts, eps, relu)


class StoredSites(Sites):
    """Sites of a stage that also say how its maps are stored; made by `masked_storage`.

    Attributes:
        packed: the outputs of this stage are rows [N, C]; else [B, C, h, w].
        rows: the row list of `active`.
        source_rows: that of `source`, or None.
    """

    packed: bool
    rows: RowList
    source_rows: "RowList | None"
    _lists: dict[Window, WindowLists]

    @classmethod
    def make(cls, sites: Sites, packed: bool, rows: RowList, source_rows: "RowList | None") -> "StoredSites":
        """Sites with a storage."""
        made = cls(*sites)
        made.packed, made.rows, made.source_rows, made._lists = packed, rows, source_rows, {}
        return made

    @classmethod
    def of(cls, sites: Sites) -> "StoredSites":
        """The sites of one packed stage on its own."""
        source_rows = None if sites.source is None else RowList(sites.source)
        return cls.make(sites, True, RowList(sites.active), source_rows)

    def inputs(self, x: Tensor, window: Window) -> RowList:
        """The row list of a window's input x: that of the stage, or of the one before where the size differs."""
        before = self.source_rows
        if before is None or before.size == self.rows.size or (x.dim() == 4 and tuple(x.shape[2:]) == self.rows.size):
            return self.rows
        return before if window.output_size(before.size) == self.rows.size else self.rows

    def lists(self, window: Window, inputs: RowList) -> WindowLists:
        """The lists of a window over `inputs`, made once."""
        if window not in self._lists:
            self._lists[window] = WindowLists(window, inputs, self.rows)
        return self._lists[window]

    def packs(self, x: Tensor) -> bool:
        """Whether a layer of this stage works on rows of x."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return self.packed and x.dtype in DTYPES and dtype in DTYPES


def as_rows(x: Tensor, rows: RowList) -> Tensor:
    """x as rows, whichever way it is stored."""
    return x if x.dim() == 2 else rows.pack(x)


def as_map(x: Tensor, rows: RowList) -> Tensor:
    """x as a map, whichever way it is stored."""
    return x if x.dim() == 4 else rows.unpack(x)


def unsupported_rows(x: Tensor, *_: Any, **__: Any) -> list[str]:
    """Why the C++ functions cannot work on x."""
    found = [] if x.device.type == "cpu" else [f"x must be on cpu, got {x.device}"]
    return found if x.dtype in DTYPES else [*found, f"x must be one of {DTYPES}, got {x.dtype}"]


def _avoid(*_: Any, **__: Any) -> list[str]:
    return ["packing and unpacking around every layer costs what it saves; `masked_storage` keeps rows packed"]


def register_packed(op: Operation, run: Callable[..., Tensor]) -> None:
    """Register `run`, which packs and unpacks around one layer, as backend "cpp"."""
    register(op, "cpp", run, unsupported_reasons=unsupported_rows, available=reasons, avoid=_avoid)
