"""Similarities of rows to a queue, their softmax sums and the gradient, without ever storing them.

With a = query . n, b = key . n over the queue rows n and d = b - a (unit rows bound a and b by 1, so at
temperatures of tiles.MIN_TAU or more no exponential needs a reference, and sums of parts just add):
  stats     Z_info = sum e^{a/tau_info}, Z_q = sum e^{a/tau_kl}, D_q = sum e^{a/tau_kl} d,
            Z_p = sum e^{b/tau_kl},      D_p = sum e^{b/tau_kl} d            -> partials [S, G, 5, M]
  gradient  w = c1 e^{a/tau_info} + e^{a/tau_kl} (c2 - c3 d) - c4 e^{b/tau_kl}; sum w n -> partials [S, G, M, D]
A program holds BLOCK_M rows of one or two queries (G) and their key in registers and shared memory and goes through its
part of the queue (S parts) BLOCK_N rows at a time; both queries share b. Operands are fp16, accumulation and logits
fp32. Sums of a tile stay [BLOCK_M, 4]: the four threads that hold a row in the tensor-core layout meet once, after the
loop. Where tau_info : tau_kl is N_KL : N_INFO in small integers, both exponentials are powers of one root (7 : 4 by
default).

Arguments travel in groups:
  operands  pointers of queries, keys and queue, and of the index maps of query rows and key rows (read without InfoNCE
  only) sizes     M, rows of the query table, rows of the key table, K
  scales    log2(e) / tau_info and log2(e) / tau_kl
  FORM      constexpr (D, queries a program, with InfoNCE, N_INFO, N_KL, BLOCK_M, BLOCK_N, BLOCK_D, WHOLE,
            FOLDED, KEPT); see `form`
WHOLE says that the queue is a multiple of BLOCK_N rows, so that no step reaches beyond its end. With FOLDED the
gradient takes c4 into the exponent, e^{b/tau_kl + log c4}: one more exponential for a second query, but no exponential
of the key waits in registers for the queries, which makes room for a larger tile. With KEPT the offsets of the queue's
rows within a block wait in registers, one instruction less an address.
"""

import triton
import triton.language as tl

from rcmstr_fast.kernels.queue_losses.tiles import Tile


def form(tile: Tile, width: int, info: bool, powers: tuple[int, int], keys: int) -> tuple[int, ...]:
    """FORM of a launch with a tile over `keys` queue rows: what is known when a kernel is compiled."""
    whole = keys % tile.block_n == 0
    shape = (tile.block_m, tile.block_n, tile.block_d or width)
    return (width, tile.queries, info, *powers, *shape, whole, tile.folded, tile.kept)


@triton.jit
def _power(x, N: tl.constexpr):
    x2 = x * x
    x4 = x2 * x2
    if N == 1:
        return x
    elif N == 2:
        return x2
    elif N == 3:
        return x2 * x
    elif N == 4:
        return x4
    elif N == 5:
        return x4 * x
    elif N == 6:
        return x4 * x2
    elif N == 7:
        return x4 * (x2 * x)
    else:
        return x4 * x4


@triton.jit
def _exponentials(s, inside, scales, FORM: tl.constexpr):
    """e^{s / tau_info} and e^{s / tau_kl}, 0 outside the queue."""
    N_INFO: tl.constexpr = FORM[3]
    N_KL: tl.constexpr = FORM[4]
    if N_KL > 0:
        root = _exponential(s, inside, scales[1] / N_KL, 0.0, FORM)
        return _power(root, N_INFO), _power(root, N_KL)
    else:
        return _exponential(s, inside, scales[0], 0.0, FORM), _exponential(s, inside, scales[1], 0.0, FORM)


@triton.jit
def _two_temperatures(s, inside, info, kl, scales, FORM: tl.constexpr):
    """info e^{s / tau_info} + kl e^{s / tau_kl}, 0 outside the queue; of a root the lower power is taken out."""
    N_INFO: tl.constexpr = FORM[3]
    N_KL: tl.constexpr = FORM[4]
    if N_KL == 0:
        e_info, e_kl = _exponentials(s, inside, scales, FORM)
        return info * e_info + kl * e_kl
    root = _exponential(s, inside, scales[1] / N_KL, 0.0, FORM)
    if N_KL > N_INFO:
        return _power(root, N_INFO) * (info + _power(root, N_KL - N_INFO) * kl)
    elif N_KL < N_INFO:
        return _power(root, N_KL) * (info * _power(root, N_INFO - N_KL) + kl)
    else:
        return _power(root, N_KL) * (info + kl)


@triton.jit
def _exponential(s, inside, scale, shift, FORM: tl.constexpr):
    """2^(s scale + shift), 0 outside the queue."""
    if FORM[8]:
        return tl.exp2(s * scale + shift)
    else:
        return tl.exp2(s * scale + (shift + tl.where(inside, 0.0, float("-inf"))[None, :]))


@triton.jit
def _load_queue(queue_ptr, first, columns, inside, FORM: tl.constexpr):
    """A block of the queue from row `first` on; 0 beyond its end."""
    D: tl.constexpr = FORM[0]
    BLOCK_N: tl.constexpr = FORM[6]
    if FORM[10]:
        at = queue_ptr + tl.cast(first, tl.int64) * D + (tl.arange(0, BLOCK_N)[:, None] * D + columns[None, :])
    else:
        at = queue_ptr + ((first + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None] * D + columns[None, :])
    if FORM[8]:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside[:, None], other=0.0)


@triton.jit
def _row_sums(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] -> [BLOCK_M, 4] without leaving the thread in the mma and wgmma layouts."""
    return tl.sum(tl.sum(tl.reshape(x, [BLOCK_M, BLOCK_N // 8, 4, 2]), axis=1), axis=2)


@triton.jit
def _load_rows(rows_ptr, map_ptr, offs_m, M, table_rows, D: tl.constexpr, MAPPED: tl.constexpr):
    """Rows [BLOCK_M, D] (through an index map); NaN beyond the end and for an index outside the table."""
    rows = offs_m.to(tl.int64)
    inside = offs_m < M
    if MAPPED:
        rows = tl.load(map_ptr + rows, mask=inside, other=-1)
        inside = (rows >= 0) & (rows < table_rows)
    offsets = rows[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(rows_ptr + offsets, mask=inside[:, None], other=float("nan"))


@triton.jit
def _load_queries(operands, which, offs_m, sizes, FORM: tl.constexpr):
    """Rows of query number `which`; of pairs, through the index map."""
    D: tl.constexpr = FORM[0]
    INFO: tl.constexpr = FORM[2]
    return _load_rows(operands[0] + which * sizes[0] * D, operands[3], offs_m, sizes[0], sizes[1], D, not INFO)


@triton.jit
def _load_keys(operands, offs_m, sizes, FORM: tl.constexpr):
    INFO: tl.constexpr = FORM[2]
    return _load_rows(operands[1], operands[4], offs_m, sizes[0], sizes[2], FORM[0], not INFO)


@triton.jit
def _add_stats(sums, a, b, e_key, inside, scales, FORM: tl.constexpr):
    """Z_info, Z_q, D_q and D_p with a block of the queue added."""
    INFO: tl.constexpr = FORM[2]
    BLOCK_M: tl.constexpr = FORM[5]
    BLOCK_N: tl.constexpr = FORM[6]
    z_info, z_q, d_q, d_p = sums
    if INFO:
        e_info, e_q = _exponentials(a, inside, scales, FORM)
        z_info += _row_sums(e_info, BLOCK_M, BLOCK_N)
    else:
        e_q = _exponential(a, inside, scales[1], 0.0, FORM)
    d = b - a
    z_q += _row_sums(e_q, BLOCK_M, BLOCK_N)
    d_q += _row_sums(e_q * d, BLOCK_M, BLOCK_N)
    d_p += _row_sums(e_key * d, BLOCK_M, BLOCK_N)
    return z_info, z_q, d_q, d_p


@triton.jit
def _store_stats(partials_ptr, offs_m, M, sums, z_p):
    z_info, z_q, d_q, d_p = sums
    inside = offs_m < M
    rows = partials_ptr + offs_m
    tl.store(rows, tl.sum(z_info, axis=1), mask=inside)
    tl.store(rows + M, tl.sum(z_q, axis=1), mask=inside)
    tl.store(rows + 2 * M, tl.sum(d_q, axis=1), mask=inside)
    tl.store(rows + 3 * M, tl.sum(z_p, axis=1), mask=inside)
    tl.store(rows + 4 * M, tl.sum(d_p, axis=1), mask=inside)


@triton.jit
def stats_part(operands, partials_ptr, place, sizes, part_size, scales, FORM: tl.constexpr):
    """Partial softmax sums of one row tile of queries over one part of the queue.

    `place`: row tile, part, first query of the program, and number of queries.
    """
    D: tl.constexpr = FORM[0]
    QUERIES: tl.constexpr = FORM[1]
    BLOCK_M: tl.constexpr = FORM[5]
    BLOCK_N: tl.constexpr = FORM[6]
    row_tile, part, group, groups = place
    M, K = sizes[0], sizes[3]
    offs_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    key = _load_keys(operands, offs_m, sizes, FORM)
    query = _load_queries(operands, group, offs_m, sizes, FORM)
    if QUERIES == 2:
        query2 = _load_queries(operands, group + 1, offs_m, sizes, FORM)
    z_p = tl.zeros([BLOCK_M, 4], tl.float32)
    z_info, z_q, d_q, d_p = z_p, z_p, z_p, z_p
    z_info2, z_q2, d_q2, d_p2 = z_p, z_p, z_p, z_p
    start = part * part_size
    end = tl.minimum(start + part_size, K)
    for first in range(start, end, BLOCK_N):
        inside = first + tl.arange(0, BLOCK_N) < end
        n = tl.trans(_load_queue(operands[2], first, tl.arange(0, D), inside, FORM))
        b = tl.dot(key, n)
        e_key = _exponential(b, inside, scales[1], 0.0, FORM)
        z_p += _row_sums(e_key, BLOCK_M, BLOCK_N)
        a = tl.dot(query, n)
        z_info, z_q, d_q, d_p = _add_stats((z_info, z_q, d_q, d_p), a, b, e_key, inside, scales, FORM)
        if QUERIES == 2:
            a = tl.dot(query2, n)
            z_info2, z_q2, d_q2, d_p2 = _add_stats((z_info2, z_q2, d_q2, d_p2), a, b, e_key, inside, scales, FORM)
    mine = partials_ptr + (part * groups + group) * 5 * M
    _store_stats(mine, offs_m, M, (z_info, z_q, d_q, d_p), z_p)
    if QUERIES == 2:
        _store_stats(mine + 5 * M, offs_m, M, (z_info2, z_q2, d_q2, d_p2), z_p)


@triton.jit
def _stats_kernel(operands, partials_ptr, sizes, part_size, scales, FORM: tl.constexpr):
    """`stats_part` of every row tile, part and query (grid: row tiles, parts, G / QUERIES).

    Note: reads (M / BLOCK_M) K D 2 bytes of queue through the L2 cache, writes 20 S G M bytes; 2 (QUERIES + 1) M K D
    multiply-adds a group. Bitwise repeatable.
    """
    QUERIES: tl.constexpr = FORM[1]
    group = tl.program_id(2).to(tl.int64) * QUERIES
    place = (tl.program_id(0), tl.program_id(1), group, tl.num_programs(2) * QUERIES)
    stats_part(operands, partials_ptr, place, sizes, part_size, scales, FORM)


@triton.jit
def _load_coefficients(coefficients_ptr, offs_m, M, FORM: tl.constexpr):
    """c1, c2, c3, c4 of the rows; FOLDED: the logarithm of c4, which `row_terms` never makes negative."""
    inside = offs_m < M
    rows = coefficients_ptr + offs_m
    c1 = tl.load(rows, mask=inside, other=0.0)
    c2 = tl.load(rows + M, mask=inside, other=0.0)
    c3 = tl.load(rows + 2 * M, mask=inside, other=0.0)
    c4 = tl.load(rows + 3 * M, mask=inside, other=0.0)
    if FORM[9]:
        c4 = tl.log2(c4)
    return c1[:, None], c2[:, None], c3[:, None], c4[:, None]


@triton.jit
def _weights(a, b, e_key, inside, coefficients, scales, FORM: tl.constexpr):
    """Gradient of the loss in each similarity, times the row's c6 (`row_terms`), in fp16."""
    INFO: tl.constexpr = FORM[2]
    c1, c2, c3, c4 = coefficients
    slope = c2 - c3 * (b - a)
    if INFO:
        weights = _two_temperatures(a, inside, c1, slope, scales, FORM)
    else:
        weights = _exponential(a, inside, scales[1], 0.0, FORM) * slope
    if FORM[9]:
        weights -= _exponential(b, inside, scales[1], c4, FORM)
    else:
        weights -= c4 * e_key
    return weights.to(tl.float16)


@triton.jit
def gradient_part(operands, coefficients_ptr, partials_ptr, place, sizes, part_size, scales, FORM: tl.constexpr):
    """Partial gradient of one row tile of queries, in BLOCK_D columns, over one part of the queue.

    `place`: row tile, part, first query of the program, number of queries, and first column.
    """
    D: tl.constexpr = FORM[0]
    QUERIES: tl.constexpr = FORM[1]
    BLOCK_M: tl.constexpr = FORM[5]
    BLOCK_N: tl.constexpr = FORM[6]
    BLOCK_D: tl.constexpr = FORM[7]
    SLICES: tl.constexpr = D // BLOCK_D
    row_tile, part, group, groups, column = place
    M, K = sizes[0], sizes[3]
    offs_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = column + tl.arange(0, BLOCK_D)
    key = _load_keys(operands, offs_m, sizes, FORM)
    query = _load_queries(operands, group, offs_m, sizes, FORM)
    c = _load_coefficients(coefficients_ptr + group * 6 * M, offs_m, M, FORM)
    gradient = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if QUERIES == 2:
        query2 = _load_queries(operands, group + 1, offs_m, sizes, FORM)
        c2 = _load_coefficients(coefficients_ptr + (group + 1) * 6 * M, offs_m, M, FORM)
        gradient2 = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start = part * part_size
    end = tl.minimum(start + part_size, K)
    for first in range(start, end, BLOCK_N):
        inside = first + tl.arange(0, BLOCK_N) < end
        n = _load_queue(operands[2], first, tl.arange(0, D), inside, FORM)
        if SLICES == 1:  # noqa: SIM108  (a constexpr branch: only one side exists)
            n_out = n
        else:
            n_out = _load_queue(operands[2], first, offs_d, inside, FORM)
        b = tl.dot(key, tl.trans(n))
        if FORM[9]:  # noqa: SIM108  (a constexpr branch)
            e_key = b
        else:
            e_key = _exponential(b, inside, scales[1], 0.0, FORM)
        a = tl.dot(query, tl.trans(n))
        # The product of the second query runs beside the weights of the first; two exponentials leave no registers for it.
        if QUERIES == 2 and FORM[4] > 0:
            a2 = tl.dot(query2, tl.trans(n))
        gradient = tl.dot(_weights(a, b, e_key, inside, c, scales, FORM), n_out, gradient)
        if QUERIES == 2:
            if FORM[4] == 0:
                a2 = tl.dot(query2, tl.trans(n))
            gradient2 = tl.dot(_weights(a2, b, e_key, inside, c2, scales, FORM), n_out, gradient2)
    row = (part * groups + group) * M + offs_m
    mask = (offs_m < M)[:, None]
    tl.store(partials_ptr + row[:, None] * D + offs_d[None, :], gradient, mask=mask)
    if QUERIES == 2:
        tl.store(partials_ptr + (row + M)[:, None] * D + offs_d[None, :], gradient2, mask=mask)


@triton.jit
def _gradient_kernel(operands, coefficients_ptr, partials_ptr, sizes, part_size, scales, FORM: tl.constexpr):
    """`gradient_part` of all (grid: row tiles, parts, (G / QUERIES) (D / BLOCK_D)).

    Note: recomputes the similarities (2 (QUERIES + 1) M K D multiply-adds, for each of the D / BLOCK_D slices) and
    multiplies by the queue (2 QUERIES M K BLOCK_D); writes 4 S G M D bytes. Bitwise repeatable.
    """
    QUERIES: tl.constexpr = FORM[1]
    BLOCK_D: tl.constexpr = FORM[7]
    SLICES: tl.constexpr = FORM[0] // BLOCK_D
    group = (tl.program_id(2) // SLICES).to(tl.int64) * QUERIES
    groups, column = (tl.num_programs(2) // SLICES) * QUERIES, (tl.program_id(2) % SLICES) * BLOCK_D
    place = (tl.program_id(0), tl.program_id(1), group, groups, column)
    gradient_part(operands, coefficients_ptr, partials_ptr, place, sizes, part_size, scales, FORM)
