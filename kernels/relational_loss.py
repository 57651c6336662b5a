"""Launchers of the queue losses: stats pass, row terms, gradient pass, fixed-order reduction.

Nothing here synchronises; extra memory is fp16 copies of the operands that are not fp16 already, [S, G, 5, M]
partial sums and [S, G, M, D] partial gradients (S parts of the queue, at most `tiles.WORKSPACE_BYTES`).
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from rcmstr_fast.kernels import queue_similarity as similarity
from rcmstr_fast.kernels import row_terms, runtime, tiles

_ROWS = 16  # rows a program of the row-wise kernels


@dataclass(frozen=True)
class _Problem:
    """One loss term on the device: operands in fp16, temperatures, and the index maps where there are any."""

    queries: Tensor  # [G, M or query rows, D]
    keys: Tensor
    queue: Tensor
    rows: int
    tau_info: float | None
    tau_kl: float
    alpha: float
    query_rows: Tensor | None = None
    key_rows: Tensor | None = None

    def launch(self, kind: str, extra: tuple[Tensor, ...], partials_of: tuple[int, ...]) -> Tensor:
        """Run the "stats" or "gradient" kernel; returns its partials [S, G, *partials_of], fp32."""
        groups, _, width = self.queries.shape
        device = self.queries.device
        tile = tiles.tile(kind, runtime.architecture(device), width, groups)
        slices = 1 if tile.block_d == 0 else width // tile.block_d
        layers = groups // tile.queries * slices
        row_tiles = triton.cdiv(self.rows, tile.block_m)
        count = self.queue.shape[0]
        parts = tiles.split(
            row_tiles * layers,
            triton.cdiv(count, tile.block_n),
            runtime.multiprocessors(device) * tile.resident,
            4 * groups * math.prod(partials_of),
        )
        keys_a_part = triton.cdiv(triton.cdiv(count, parts), tile.block_n) * tile.block_n
        parts = triton.cdiv(count, keys_a_part)
        partials = torch.empty((parts, groups, *partials_of), dtype=torch.float32, device=device)
        n_info, n_kl = (0, 0) if self.tau_info is None else tiles.power_ratio(self.tau_info, self.tau_kl)
        kernel = similarity._stats_kernel if kind == "stats" else similarity._gradient_kernel
        blocks = {} if kind == "stats" else {"BLOCK_D": tile.block_d or width}
        kernel[(row_tiles, parts, layers)](
            self.queries, self.keys, self.queue,
            self.keys if self.query_rows is None else self.query_rows,
            self.keys if self.key_rows is None else self.key_rows,
            *extra, partials,
            self.rows, self.queries.shape[1], self.keys.shape[0], count, keys_a_part,
            math.log2(math.e) / (self.tau_info or self.tau_kl), math.log2(math.e) / self.tau_kl,
            D=width, QUERIES=tile.queries, INFO=self.tau_info is not None, N_INFO=n_info, N_KL=n_kl,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **blocks,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return partials

    def row_terms(self, originals: list[Tensor], key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """infos [G, M], kls [G, M] and coefficients [G, 6, M] of every row."""
        groups, width = len(originals), self.queries.shape[2]
        partials = self.launch("stats", (), (5, self.rows))
        infos, kls = (torch.empty((groups, self.rows), dtype=torch.float32, device=key.device) for _ in range(2))
        coefficients = torch.empty((groups, 6, self.rows), dtype=torch.float32, device=key.device)
        for g, query in enumerate(originals):
            row_terms._row_terms_kernel[(triton.cdiv(self.rows, _ROWS),)](
                query, key, partials[:, g], infos[g], kls[g], coefficients[g],
                self.rows, partials.shape[0], partials.stride(0),
                self.tau_info or self.tau_kl, self.tau_kl, self.alpha,
                D=width, INFO=self.tau_info is not None, BLOCK_M=_ROWS,
            )  # fmt: skip
        return infos, kls, coefficients


def _half(rows: Tensor) -> Tensor:
    return rows.to(torch.float16).contiguous()


def relational_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    query_permuted: Tensor | None,
    tau_info: float,
    tau_kl: float,
    alpha: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss, InfoNCE and KL of `ops.relational_loss` and the gradients of the loss in its queries.

    Args:
        query: [M, D] float16, bfloat16 or float32 on one CUDA device; D in `tiles.WIDTHS`.
        key: [M, D].
        queue: [K, D].
        query_permuted: [M, D] or None.
        tau_info: at least `tiles.MIN_TAU`.
        tau_kl: at least `tiles.MIN_TAU`.
        alpha: weight of the KL.
        with_gradient: False skips the second pass.
    Returns:
        Three 0-d float32 tensors and the gradients [M, D] float32 of each query (none without).

    Note:
        Operands fp16, logits, sums and gradients fp32, bitwise repeatable.
    """
    originals = [rows.contiguous() for rows in (query, query_permuted) if rows is not None]
    key = key.contiguous()
    count, width = query.shape
    with runtime.on_device(query.device):
        queries = _half(query)[None] if query_permuted is None else torch.stack([_half(rows) for rows in originals])
        problem = _Problem(queries, _half(key), _half(queue), count, tau_info, tau_kl, alpha)
        infos, kls, coefficients = problem.row_terms(originals, key)
        info, kl = infos.mean(), kls.mean()
        gradients = []
        if with_gradient:
            partials = problem.launch("gradient", (coefficients,), (count, width))
            share = 1.0 / (count * len(originals))
            for g in range(len(originals)):
                gradients.append(torch.empty((count, width), dtype=torch.float32, device=query.device))
                row_terms._reduce_kernel[(triton.cdiv(count, _ROWS),)](
                    partials[:, g], coefficients[g], key, gradients[g],
                    count, partials.shape[0], partials.stride(0), share,
                    D=width, BLOCK_M=_ROWS,
                )  # fmt: skip
    return info + alpha * kl, info, kl, gradients


def relation_kl(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    tau: float,
    query_rows: Tensor | None,
    key_rows: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Symmetric KL of `ops.relation_kl` and its gradient in the query.

    Args:
        query: [M, D] float16, bfloat16 or float32 on one CUDA device; D in `tiles.WIDTHS`.
        key: [N, D].
        queue: [K, D].
        tau: at least `tiles.MIN_TAU`.
        query_rows: [R] int64 or None; a pair whose index lies outside its table makes the result NaN.
        key_rows: [R] int64 or None.
        with_gradient: False skips the second pass.
    Returns:
        A 0-d float32 tensor and the gradient [M, D] float32, or None.
    """
    pairs, width = (query if query_rows is None else query_rows).shape[0], query.shape[1]
    with runtime.on_device(query.device):
        every = torch.arange(pairs, device=query.device)
        query_rows = every if query_rows is None else query_rows.contiguous()
        key_rows = every if key_rows is None else key_rows.contiguous()
        queries, keys = _half(query)[None], _half(key)
        problem = _Problem(queries, keys, _half(queue), pairs, None, tau, 1.0, query_rows, key_rows)
        _, kls, coefficients = problem.row_terms([queries[0]], keys)
        kl = kls.mean()
        if not with_gradient:
            return kl, None
        partials = problem.launch("gradient", (coefficients,), (pairs, width))
        order = torch.argsort(query_rows, stable=True)
        starts = torch.searchsorted(query_rows[order], torch.arange(query.shape[0] + 1, device=query.device))
        gradient = torch.empty(query.shape, dtype=torch.float32, device=query.device)
        row_terms._gather_kernel[(query.shape[0],)](
            partials, coefficients, order, starts, gradient,
            pairs, partials.shape[0], partials.stride(0), 1.0 / pairs, D=width,
        )  # fmt: skip
    return kl, gradient
