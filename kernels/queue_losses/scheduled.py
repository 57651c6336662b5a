"""Several loss terms in one launch a pass: the programs of all terms stand in one flat grid.

The levels of a step (two queries, InfoNCE and KL) and its terms between levels (one query, KL, index maps) are two
bodies of one kernel, with a FORM each (`similarity`): FORM for the levels, PAIRS for the others. A program finds its
term from the first program of each term, and then its row tile, part of the queue and layer (query or pair of queries,
slice of columns) as in a launch of its own. Row tiles vary fastest, so that programs that run together read the same
part of a queue.

What a single launch has once stands here in tuples with one entry for each term, levels first; `rows_of_pairs` has
entries for the terms between levels only. Partial results have the layout of separate launches, so the row-wise kernels
are the same.
"""

import triton
import triton.language as tl

from rcmstr_fast.kernels.queue_losses.similarity import gradient_part, stats_part


def pairs_form(form: tuple[int, ...]) -> tuple[int, ...]:
    """PAIRS beside the FORM of the levels: the same tile for one query without InfoNCE."""
    return (form[0], 1, False, *form[3:])


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
def _operands_of(tables, rows_of_pairs, term, LEVELS: tl.constexpr, PAIRS: tl.constexpr):
    """`operands` of a term; a level has no index maps and takes its keys in their place."""
    queries, keys, queue = _pick(tables[0], term), _pick(tables[1], term), _pick(tables[2], term)
    if PAIRS:
        return queries, keys, queue, _pick(rows_of_pairs[0], term - LEVELS), _pick(rows_of_pairs[1], term - LEVELS)
    else:
        return queries, keys, queue, keys, keys


@triton.jit
def _sizes_of(sizes, term):
    """`sizes` of a term."""
    return _pick(sizes[0], term), _pick(sizes[1], term), _pick(sizes[2], term), _pick(sizes[3], term)


@triton.jit
def _scheduled_stats_kernel(
    tables,
    rows_of_pairs,
    partials_ptrs,
    firsts,
    all_sizes,
    part_sizes,
    scales,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    FORM: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Stats pass of LEVELS levels of GROUPS queries and of the terms between levels (grid: programs of all)."""
    QUERIES: tl.constexpr = FORM[1]
    term = _term(firsts)
    partials, size, sizes = _pick(partials_ptrs, term), _pick(part_sizes, term), _sizes_of(all_sizes, term)
    tile, part, layer = _place(firsts, term, tl.cdiv(sizes[0], FORM[5]), tl.cdiv(sizes[3], size))
    # The operands of both bodies have different types, so they must not share a name.
    if term < LEVELS:
        level = _operands_of(tables, rows_of_pairs, term, LEVELS, False)
        first = layer.to(tl.int64) * QUERIES
        stats_part(level, partials, (tile, part, first, GROUPS), sizes, size, scales, FORM)
    elif len(firsts) > LEVELS:
        pairs = _operands_of(tables, rows_of_pairs, term, LEVELS, True)
        stats_part(pairs, partials, (tile, part, tl.zeros((), tl.int64), 1), sizes, size, scales, PAIRS)


@triton.jit
def _scheduled_gradient_kernel(
    tables,
    rows_of_pairs,
    coefficients_ptrs,
    partials_ptrs,
    firsts,
    all_sizes,
    part_sizes,
    scales,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    FORM: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Gradient pass of the same terms; each layer also covers a slice of BLOCK_D columns."""
    QUERIES: tl.constexpr = FORM[1]
    BLOCK_D: tl.constexpr = FORM[7]
    SLICES: tl.constexpr = FORM[0] // BLOCK_D
    term = _term(firsts)
    coefficients, partials = _pick(coefficients_ptrs, term), _pick(partials_ptrs, term)
    size, sizes = _pick(part_sizes, term), _sizes_of(all_sizes, term)
    tile, part, layer = _place(firsts, term, tl.cdiv(sizes[0], FORM[5]), tl.cdiv(sizes[3], size))
    if term < LEVELS:
        level = _operands_of(tables, rows_of_pairs, term, LEVELS, False)
        here = (tile, part, (layer // SLICES).to(tl.int64) * QUERIES, GROUPS, (layer % SLICES) * BLOCK_D)
        gradient_part(level, coefficients, partials, here, sizes, size, scales, FORM)
    elif len(firsts) > LEVELS:
        pairs = _operands_of(tables, rows_of_pairs, term, LEVELS, True)
        there = (tile, part, tl.zeros((), tl.int64), 1, layer * BLOCK_D)
        gradient_part(pairs, coefficients, partials, there, sizes, size, scales, PAIRS)
