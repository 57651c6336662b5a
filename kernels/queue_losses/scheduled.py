"""Several loss terms in one launch a pass: the programs of all terms stand in one flat grid.

The levels of a step (two queries, InfoNCE and KL) and its terms between levels (one query, KL, index maps) are
two bodies of one kernel. A program finds its term from the first program of each term, then its row tile, part of the
queue and layer (query or pair of queries, slice of columns) as in a launch of its own; row tiles vary fastest, so that
programs that run together read the same part of a queue. The operands of the terms come as tuples, levels first;
partial results have the layout of separate launches, so the row-wise kernels are the same.
"""

import triton
import triton.language as tl

from rcmstr_fast.kernels.queue_losses.similarity import gradient_part, stats_part


@triton.jit
def _pick(values, which):
    """values[which] of a tuple, `which` known at run time."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(which == i, values[i], chosen)
    return chosen


@triton.jit
def _term(firsts):
    """The term of this program: the last one that starts at or before it."""
    term = tl.zeros((), tl.int32)
    for i in tl.static_range(1, len(firsts)):
        term += (tl.program_id(0) >= firsts[i]).to(tl.int32)
    return term


@triton.jit
def _place(firsts, term, row_tiles, parts):
    """Row tile, part and layer of this program in its term."""
    place = tl.program_id(0) - _pick(firsts, term)
    return place % row_tiles, (place // row_tiles) % parts, place // (row_tiles * parts)


@triton.jit
def _scheduled_stats_kernel(
    queries_ptrs, keys_ptrs, queue_ptrs, partials_ptrs, query_rows_ptrs, key_rows_ptrs,
    firsts, all_rows, query_counts, key_counts, queue_sizes, part_sizes, scale_info, scale_kl,
    D: tl.constexpr, QUERIES: tl.constexpr, LEVELS: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr,
    N_INFO: tl.constexpr, N_KL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stats pass of LEVELS levels of GROUPS queries and TERMS - LEVELS terms between levels (grid: programs of all)."""
    term = _term(firsts)
    queries, keys, queue = _pick(queries_ptrs, term), _pick(keys_ptrs, term), _pick(queue_ptrs, term)
    partials, size = _pick(partials_ptrs, term), _pick(part_sizes, term)
    rows, query_count, key_count = _pick(all_rows, term), _pick(query_counts, term), _pick(key_counts, term)
    K = _pick(queue_sizes, term)
    tile, part, layer = _place(firsts, term, tl.cdiv(rows, BLOCK_M), tl.cdiv(K, size))
    if term < LEVELS:
        stats_part(
            queries, keys, queue, keys, keys, partials, tile, part, layer.to(tl.int64) * QUERIES, GROUPS,
            rows, query_count, key_count, K, size, scale_info, scale_kl,
            D, QUERIES, True, N_INFO, N_KL, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif TERMS > LEVELS:
        query_rows, key_rows = _pick(query_rows_ptrs, term - LEVELS), _pick(key_rows_ptrs, term - LEVELS)
        stats_part(
            queries, keys, queue, query_rows, key_rows, partials, tile, part, tl.zeros((), tl.int64), 1,
            rows, query_count, key_count, K, size, scale_info, scale_kl,
            D, 1, False, N_INFO, N_KL, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _scheduled_gradient_kernel(
    queries_ptrs, keys_ptrs, queue_ptrs, coefficients_ptrs, partials_ptrs, query_rows_ptrs, key_rows_ptrs,
    firsts, all_rows, query_counts, key_counts, queue_sizes, part_sizes, scale_info, scale_kl,
    D: tl.constexpr, QUERIES: tl.constexpr, LEVELS: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr,
    N_INFO: tl.constexpr, N_KL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient pass of the same terms; each layer also covers a slice of BLOCK_D columns."""
    SLICES: tl.constexpr = D // BLOCK_D
    term = _term(firsts)
    queries, keys, queue = _pick(queries_ptrs, term), _pick(keys_ptrs, term), _pick(queue_ptrs, term)
    coefficients, partials = _pick(coefficients_ptrs, term), _pick(partials_ptrs, term)
    rows, query_count, key_count = _pick(all_rows, term), _pick(query_counts, term), _pick(key_counts, term)
    K, size = _pick(queue_sizes, term), _pick(part_sizes, term)
    tile, part, layer = _place(firsts, term, tl.cdiv(rows, BLOCK_M), tl.cdiv(K, size))
    if term < LEVELS:
        group, column = (layer // SLICES).to(tl.int64) * QUERIES, (layer % SLICES) * BLOCK_D
        gradient_part(
            queries, keys, queue, keys, keys, coefficients, partials, tile, part, group, column, GROUPS,
            rows, query_count, key_count, K, size, scale_info, scale_kl,
            D, QUERIES, True, N_INFO, N_KL, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    elif TERMS > LEVELS:
        query_rows, key_rows = _pick(query_rows_ptrs, term - LEVELS), _pick(key_rows_ptrs, term - LEVELS)
        gradient_part(
            queries, keys, queue, query_rows, key_rows, coefficients, partials, tile, part,
            tl.zeros((), tl.int64), layer * BLOCK_D, 1,
            rows, query_count, key_count, K, size, scale_info, scale_kl,
            D, 1, False, N_INFO, N_KL, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
