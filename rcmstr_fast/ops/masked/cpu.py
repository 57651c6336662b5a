"""The masked layers on a CPU: only the rows of active sites are stored and computed.

A map [B, C, h, w] with N active sites is held as rows [N, C] in the order of the sites. `RowList` says which sites of
one map are active, `WindowTable` which rows a window joins, `RowSites` is the storage of a stage, and `masked_layer`
runs a layer over it. The lists are made by csrc/sites.h; what is computed over rows is in `ops.rows`.
"""

import functools
from itertools import accumulate

import torch
from torch import Tensor
from typing_extensions import Self

from rcmstr_fast.ops import native, rows
from rcmstr_fast.ops.batch_norm.reference import group_sizes
from rcmstr_fast.ops.masked.layers import Layer, Pair, Sites, StoredSites, Window, operands
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
        count = native.function("list_sites")(
            self.active.data_ptr(), batch, sites, positions.data_ptr(), self.index.data_ptr(), starts.data_ptr()
        )
        self.positions = positions[:count].clone()
        self.starts: list[int] = starts.tolist()
        self._group_starts: dict[int | None, list[int]] = {}

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

    def unpack(self, x: Tensor) -> Tensor:
        """Rows [N, C] to [B, C, h, w], channels_last, zero at inactive sites."""
        flat = x.new_zeros(self.active.numel(), x.shape[1]).index_copy(0, self.positions.long(), x)
        return flat.view(self.active.shape[0], *self.size, x.shape[1]).movedim(-1, 1)

    def group_starts(self, group_size: int | None) -> list[int]:
        """First row of each statistics group, then N."""
        if group_size not in self._group_starts:
            ends = accumulate(group_sizes(len(self.starts) - 1, group_size or 0), initial=0)
            self._group_starts[group_size] = [self.starts[end] for end in ends]
        return self._group_starts[group_size]


class WindowTable:
    """Which input row each output row meets under each tap of a window.

    Attributes:
        table: [outputs, taps] int32; input row or -1.
        inverse: [inputs, taps] int32; output row or -1.
        columns_below: input channels below which a convolution multiplies all taps at once.
    """

    def __init__(self, window: Window, inputs: RowList, outputs: RowList) -> None:
        self.taps, self.inputs, self.outputs = window.taps, inputs.count, outputs.count
        #: A 1x1 window: output row i meets input row i.
        self.identity = inputs is outputs and window == Window((1, 1), (1, 1), (0, 0))
        self.columns_below: int = choices.value(_COLUMNS.name) or _COLUMNS_BELOW
        self.table, self.inverse = _ints(self.outputs, self.taps), _ints(self.inputs, self.taps)
        native.function("window_tables")(
            (*inputs.size, *outputs.size, *window.numbers),
            outputs.positions.data_ptr(),
            self.outputs,
            inputs.index.data_ptr(),
            self.inputs,
            self.table.data_ptr(),
            self.inverse.data_ptr(),
            torch.get_num_threads(),
        )

    @functools.cached_property
    def pairs(self) -> tuple[Tensor, Tensor, list[int], Tensor, Tensor]:
        """Input row and output row of each pair by tap, first pair of each tap, and a pair's number by row and tap."""
        in_row, out_row = _ints(self.table.numel()), _ints(self.table.numel())
        starts = torch.empty(self.taps + 1, dtype=torch.int64)
        of_output, of_input = torch.empty_like(self.table), torch.empty_like(self.inverse)
        tensors = (in_row, out_row, starts, of_output, of_input)
        count = native.function("list_pairs")(
            self.table.data_ptr(), self.outputs, self.inputs, self.taps, *(t.data_ptr() for t in tensors)
        )
        return in_row[:count].clone(), out_row[:count].clone(), starts.tolist(), of_output, of_input

    @functools.cached_property
    def of_input(self) -> Tensor:
        """[inputs, taps] int32; place of (output row, tap) in the table, or -1."""
        return torch.where(self.inverse < 0, -1, self.inverse * self.taps + torch.arange(self.taps, dtype=torch.int32))


class RowSites(StoredSites):
    """Sites of a stage whose layers work on rows [N, C] of the active sites; where they are `kept`, results stay rows.

    Attributes:
        rows: the row list of `active`.
        source_rows: that of `source`, or None.
    """

    backend = "cpp"
    rows: RowList
    source_rows: RowList | None
    _tables: dict[Window, WindowTable]

    @classmethod
    def make(cls, sites: Sites, kept: bool, rows: RowList | None = None, source_rows: RowList | None = None) -> Self:
        """Store a stage; row lists that exist already are taken over."""
        made = super().make(sites, kept)
        made.rows = RowList(sites.active) if rows is None else rows
        if source_rows is None and sites.source is not None:
            source_rows = RowList(sites.source)
        made.source_rows, made._tables = source_rows, {}
        return made

    def inputs(self, x: Tensor, window: Window | None) -> RowList:
        """The row list of a layer's input x: that of the stage, or of the one before where the size differs.

        Rows do not show the size of their map, so of rows the window decides: from which of the two maps does it lead
        to the map of this stage?
        """
        before, mine = self.source_rows, self.rows
        if window is None or before is None or before.size == mine.size:
            return mine
        if x.dim() == 4 and tuple(x.shape[2:]) == mine.size:
            return mine
        return before if window.output_size(before.size) == mine.size else mine

    def take_in(self, x: Tensor, window: Window | None) -> Tensor:
        """x as rows."""
        return x if x.dim() == 2 else self.inputs(x, window).pack(x)

    def give_out(self, x: Tensor) -> Tensor:
        """Rows in their places."""
        return x if x.dim() == 4 else self.rows.unpack(x)

    def as_map(self, x: Tensor, window: Window | None) -> Tensor:
        """Rows in the places of the input map."""
        return x if x.dim() == 4 else self.inputs(x, window).unpack(x)

    def of_window(self, x: Tensor, window: Window) -> WindowTable:
        """The table of a window over x."""
        if window not in self._tables:
            self._tables[window] = WindowTable(window, self.inputs(x, window), self.rows)
        return self._tables[window]


def masked_layer(layer: Layer) -> Tensor:
    """A masked layer on rows; gives rows where the storage keeps them, else a map."""
    sites, window, norm = RowSites.of(layer.sites), layer.window, layer.norm
    x = sites.take_in(layer.x, window)
    if window is not None:
        table = sites.of_window(layer.x, window)
        x = rows.max_pool(x, table) if layer.weight is None else rows.convolution(*operands(x, layer.weight), table)
    if norm is not None:
        residual = None if norm.residual is None else sites.take_in(norm.residual, None)
        starts = sites.rows.group_starts(norm.group_size)
        x = rows.norm_rows(x, norm.weight, norm.bias, starts, norm.eps, residual, norm.relu)[0]
    return x if sites.kept else sites.give_out(x)


def reasons(layer: Layer) -> list[str]:
    """Why C++ cannot compute the layer."""
    found = rows.reasons(layer.x)
    dtype = torch.get_autocast_dtype("cpu")
    if torch.is_autocast_enabled("cpu") and dtype not in rows.DTYPES:
        found.append(f"autocast must be to one of {rows.DTYPES}, got {dtype}")
    return found
