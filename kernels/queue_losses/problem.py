"""One term of the queue losses on the device: stats pass, row terms, gradient pass, fixed-order reduction.

Nothing here synchronises; extra memory is fp16 copies of the operands that are not fp16 already, [S, G, 5, M]
partial sums and [S, G, M, D] partial gradients (S parts of the queue, at most `tiles.WORKSPACE_BYTES`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from rcmstr_fast.kernels import runtime
from rcmstr_fast.kernels.queue_losses import row_terms, similarity, tiles

_ROWS = 16  # rows a program of the row-wise kernels


@dataclass(frozen=True)
class Problem:
    """One loss term on the device.

    Attributes:
        originals: the queries [M, D] as they were given (of pairs: the fp16 rows), contiguous.
        original_key: likewise the key.
        queries: [G, M or query rows, D] float16.
        keys: float16.
        queue: [K, D] float16.
        rows: M, or the number of pairs.
        tau_info: None: the KL alone, over pairs.
        tau_kl: temperature of the KL.
        alpha: weight of the KL.
        query_rows: [M] int64 where there is no InfoNCE.
        key_rows: [M] int64 where there is no InfoNCE.
    """

    originals: list[Tensor]
    original_key: Tensor
    queries: Tensor
    keys: Tensor
    queue: Tensor
    rows: int
    tau_info: float | None
    tau_kl: float
    alpha: float
    query_rows: Tensor | None = None
    key_rows: Tensor | None = None

    @property
    def width(self) -> int:
        """D."""
        return self.queries.shape[2]

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """Tensors of a launch; see `similarity`."""
        rows, key_rows = self.query_rows, self.key_rows
        maps = (self.keys if rows is None else rows, self.keys if key_rows is None else key_rows)
        return self.queries, self.keys, self.queue, *maps

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """M, rows of the query table, rows of the key table, K."""
        return self.rows, self.queries.shape[1], self.keys.shape[0], self.queue.shape[0]

    @property
    def powers(self) -> tuple[int, int]:
        """N_INFO, N_KL."""
        return (0, 0) if self.tau_info is None else tiles.power_ratio(self.tau_info, self.tau_kl)

    @property
    def scales(self) -> tuple[float, float]:
        """log2(e) / tau of both temperatures."""
        return math.log2(math.e) / (self.tau_info or self.tau_kl), math.log2(math.e) / self.tau_kl

    def tile(self, kind: str) -> tiles.Tile:
        """The tile of a launch of its own."""
        return tiles.tile(kind, runtime.architecture(self.queries.device), self.width, self.queries.shape[0])

    def layers(self, tile: tiles.Tile, kind: str) -> int:
        """Programs that share a row tile and a part of the queue: queries and slices of columns."""
        slices = self.width // tile.block_d if kind == "gradient" and tile.block_d else 1
        return self.queries.shape[0] // min(tile.queries, self.queries.shape[0]) * slices

    def partials_of(self, kind: str) -> tuple[int, ...]:
        """Partial results of one query over one part of the queue."""
        return (5, self.rows) if kind == "stats" else (self.rows, self.width)

    def form(self, tile: tiles.Tile) -> tuple[int, ...]:
        """FORM of the kernels with a tile; see `similarity`."""
        return similarity.form(tile, self.width, self.tau_info is not None, self.powers, self.queue.shape[0])

    def launch(self, kind: str, coefficients: tuple[Tensor, ...] = ()) -> Tensor:
        """Run the "stats" or "gradient" kernel; returns its partials [S, G, *partials_of], fp32."""
        groups, device = self.queries.shape[0], self.queries.device
        tile, shape, count = self.tile(kind), self.partials_of(kind), self.queue.shape[0]
        row_tiles, layers = triton.cdiv(self.rows, tile.block_m), self.layers(tile, kind)
        parts = tiles.split(
            row_tiles * layers,
            triton.cdiv(count, tile.block_n),
            runtime.multiprocessors(device) * tile.resident,
            4 * groups * math.prod(shape),
        )
        part_size = triton.cdiv(triton.cdiv(count, parts), tile.block_n) * tile.block_n
        parts = triton.cdiv(count, part_size)
        partials = torch.empty((parts, groups, *shape), dtype=torch.float32, device=device)
        kernel = similarity._stats_kernel if kind == "stats" else similarity._gradient_kernel
        tensors = (self.operands, *coefficients, partials)
        kernel[(row_tiles, parts, layers)](
            *tensors,
            self.sizes,
            part_size,
            self.scales,
            FORM=self.form(tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return partials

    def row_terms(self, partials: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """infos [G, M] (empty memory without InfoNCE), kls [G, M] and coefficients [G, 6, M] of every row."""
        groups, device = len(self.originals), self.queries.device
        infos, kls = (torch.empty((groups, self.rows), dtype=torch.float32, device=device) for _ in range(2))
        coefficients = torch.empty((groups, 6, self.rows), dtype=torch.float32, device=device)
        for g, query in enumerate(self.originals):
            row_terms._row_terms_kernel[(triton.cdiv(self.rows, _ROWS),)](
                query,
                self.original_key,
                partials[:, g],
                infos[g],
                kls[g],
                coefficients[g],
                self.rows,
                partials.shape[0],
                partials.stride(0),
                self.tau_info or self.tau_kl,
                self.tau_kl,
                self.alpha,
                D=self.width,
                INFO=self.tau_info is not None,
                BLOCK_M=_ROWS,
            )
        return infos, kls, coefficients

    def reduce(self, partials: Tensor, coefficients: Tensor, gradients: list[Tensor]) -> None:
        """Write the gradient [M, D] float32 of each query from its partials."""
        share = 1.0 / (self.rows * len(self.originals))
        if self.query_rows is not None:
            count = gradients[0].shape[0]
            order = torch.argsort(self.query_rows, stable=True)
            starts = torch.searchsorted(self.query_rows[order], torch.arange(count + 1, device=order.device))
            row_terms._gather_kernel[(count,)](
                partials,
                coefficients,
                order,
                starts,
                gradients[0],
                self.rows,
                partials.shape[0],
                partials.stride(0),
                share,
                D=self.width,
            )
            return
        for g, gradient in enumerate(gradients):
            row_terms._reduce_kernel[(triton.cdiv(self.rows, _ROWS),)](
                partials[:, g],
                coefficients[g],
                self.original_key,
                gradient,
                self.rows,
                partials.shape[0],
                partials.stride(0),
                share,
                D=self.width,
                BLOCK_M=_ROWS,
            )


def half(rows: Tensor) -> Tensor:
    """Contiguous fp16 operand."""
    return rows.to(torch.float16).contiguous()


def level_problem(
    queries: list[Tensor],
    key: Tensor,
    queue: Tensor,
    tau_info: float,
    tau_kl: float,
    alpha: float,
    convert: Callable[[Tensor], Tensor] = half,
) -> Problem:
    """InfoNCE and KL of one or two queries [M, D]; `convert` makes the fp16 operands."""
    originals = [rows.contiguous() for rows in queries]
    halves = convert(queries[0])[None] if len(queries) == 1 else torch.stack([half(rows) for rows in queries])
    return Problem(
        originals, key.contiguous(), halves, convert(key), convert(queue), key.shape[0], tau_info, tau_kl, alpha
    )


def pairs_problem(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    tau: float,
    query_rows: Tensor | None,
    key_rows: Tensor | None,
    convert: Callable[[Tensor], Tensor] = half,
) -> Problem:
    """The KL alone over pairs of rows; `convert` makes the fp16 operands."""
    pairs = (query if query_rows is None else query_rows).shape[0]
    every = torch.arange(pairs, device=query.device)
    query_rows = every if query_rows is None else query_rows.contiguous()
    key_rows = every if key_rows is None else key_rows.contiguous()
    query, key = convert(query), convert(key)
    return Problem([query], key, query[None], key, convert(queue), pairs, None, tau, 1.0, query_rows, key_rows)
