"""Active sites as rows, and which rows a window joins: the lists behind packed rows (csrc/sites.h, on the CPU)."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops.reference.masked_norm import group_sizes

try:
    from rcmstr_fast import _C  # type: ignore[attr-defined]
except ImportError:
    _C = None

Pair = tuple[int, int]


def reasons() -> list[str]:
    """Why this build cannot make lists or work on packed rows."""
    return [] if hasattr(_C, "list_sites") else ["the extension rcmstr_fast._C is not built"]


def native(name: str, dtype: torch.dtype | None = None) -> Any:
    """A function of the extension, in its form for rows of `dtype`."""
    return getattr(_C, name if dtype is None else f"{name}_{str(dtype).removeprefix('torch.')}")


def _ints(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32)


class RowList:
    """The active sites of one map as rows.

    Attributes:
        active: [B, 1, h, w] bool.
        positions: [N] int32; the site of each row in the flattened map, ascending.
        index: [B * h * w] int32; the row of each site or -1.
        starts: [B + 1] ints; rows before each image.
    """

    def __init__(self, active: Tensor) -> None:
        self.active = active.contiguous()
        batch, sites = active.shape[0], active.shape[2] * active.shape[3]
        positions, self.index, starts = _ints(batch * sites), _ints(batch * sites), _ints(batch + 1)
        count = native("list_sites")(
            self.active.data_ptr(), batch, sites, positions.data_ptr(), self.index.data_ptr(), starts.data_ptr()
        )
        self.positions = positions[:count].clone()
        self.starts: list[int] = starts.tolist()

    @property
    def size(self) -> Pair:
        """(h, w) of the map."""
        return self.active.shape[2], self.active.shape[3]

    @property
    def count(self) -> int:
        """N."""
        return len(self.positions)

    def pack(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] to rows [N, C]; what inactive sites hold is dropped."""
        return x.movedim(1, -1).reshape(-1, x.shape[1]).index_select(0, self.positions)

    def unpack(self, rows: Tensor) -> Tensor:
        """Rows [N, C] to [B, C, h, w], channels_last, zero at inactive sites."""
        flat = rows.new_zeros(self.active.numel(), rows.shape[1]).index_copy(0, self.positions.long(), rows)
        return flat.view(self.active.shape[0], *self.size, rows.shape[1]).movedim(-1, 1)

    def group_starts(self, group_size: int | None) -> list[int]:
        """First row of each statistics group, then N."""
        groups = group_sizes(len(self.starts) - 1, group_size or 0)
        ends = [sum(groups[: i + 1]) for i in range(len(groups))]
        return [0, *(self.starts[end] for end in ends)]


@dataclass(frozen=True)
class Window:
    """A kernel's geometry: rows and columns of each."""

    kernel: Pair
    stride: Pair
    padding: Pair

    def output_size(self, size: Pair) -> Pair:
        """(h, w) of the output for an input map of that size."""
        h, w = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, self.kernel, self.stride, self.padding))
        return h, w

    @property
    def taps(self) -> int:
        """Places of the kernel."""
        return self.kernel[0] * self.kernel[1]


class WindowLists:
    """Which input row each output row meets under each tap of a window.

    Attributes:
        table: [outputs, taps] int32; input row or -1.
        inverse: [inputs, taps] int32; output row or -1.
    """

    def __init__(self, window: Window, inputs: RowList, outputs: RowList) -> None:
        self.taps, self.inputs, self.outputs = window.taps, inputs.count, outputs.count
        #: A 1x1 window: output row i meets input row i.
        self.identity = inputs is outputs and window == Window((1, 1), (1, 1), (0, 0))
        self.table, self.inverse = _ints(self.outputs, self.taps), _ints(self.inputs, self.taps)
        shape = (*inputs.size, *outputs.size, *window.kernel, *window.stride, *window.padding)
        native("window_tables")(
            shape, outputs.positions.data_ptr(), self.outputs, inputs.index.data_ptr(), self.inputs,
            self.table.data_ptr(), self.inverse.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip

    @functools.cached_property
    def pairs(self) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:
        """Input row and output row of each pair by tap, first pair of each tap, and a pair's number by row and tap."""
        in_row, out_row = _ints(self.table.numel()), _ints(self.table.numel())
        starts = torch.empty(self.taps + 1, dtype=torch.int64)
        of_output, of_input = torch.empty_like(self.table), torch.empty_like(self.inverse)
        tensors = (in_row, out_row, starts, of_output, of_input)
        count = native("list_pairs")(
            self.table.data_ptr(), self.outputs, self.inputs, self.taps, *(t.data_ptr() for t in tensors)
        )
        return in_row[:count].clone(), out_row[:count].clone(), starts.tolist(), of_output, of_input

    @functools.cached_property
    def of_input(self) -> Tensor:
        """[inputs, taps] int32; place of (output row, tap) in the table, or -1."""
        return torch.where(self.inverse < 0, -1, self.inverse * self.taps + torch.arange(self.taps, dtype=torch.int32))
