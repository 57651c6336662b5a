"""Sparse convolution over active rows of dense channels_last maps: forward, data gradient and weight gradient.

Maps stay where the dense convolution has them. A list gives the position of each active site (a row of the matrix
product) and a 9-bit word of the taps, the places of the kernel, under which an active input lies. Rows are sorted by
that word, so a tile of BLOCK_M rows skips the taps that none of its rows has. The taps of a tile are packed into one
64-bit integer, and one loop runs over pairs of tap and channel block. Addresses are arithmetic on the position; an
index loaded in the loop would break the pipelining of the loads. What inactive sites hold is never loaded, and inactive
outputs are never written.

The data gradient is the forward kernel over the list of the inputs with the weight matrix transposed: input site i
meets output site o under tap v exactly if o meets i under v. The weight gradient of a tap is a sum over the list of the
pairs of input and output that the tap joins; all pairs are cut into about equal chunks of one tap each, as many chunks
as the tap has pairs for, and the sums of its chunks are added in a fixed order.

Words are sorted upwards, so the tiles with the most taps stand last: programs take them first, and the short ones fill
the gaps at the end. NARROW says that every offset into a map fits 32 bits.

With STATS a tile also leaves behind what the batch norm that follows needs: count, mean and squared deviations of each
channel, of the values as they are stored. The norm then need not read the map for its statistics.

WINDOW is a constexpr tuple of six numbers: rows and columns of kernel, stride and padding.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import runtime
from rcmstr_fast.kernels.masked.tiles import gradient_chunks, tile, weight_tile


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _corners(positions, height, width, other_height, other_width, WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Site of the other map under tap 0 of each position (it may lie outside: the word of taps says so)."""
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    PH: tl.constexpr = WINDOW[4]
    PW: tl.constexpr = WINDOW[5]
    x = positions % width
    y = (positions // width) % height
    image = positions // (width * height)
    if TRANSPOSED:
        return (image * other_height + (y + PH) // SH) * other_width + (x + PW) // SW
    else:
        return (image * other_height + y * SH - PH) * other_width + x * SW - PW


@triton.jit
def _step(tap, other_width, WINDOW: tl.constexpr, TRANSPOSED: tl.constexpr):
    """From the site under tap 0 to the one under `tap`, for the taps that a row has."""
    KW: tl.constexpr = WINDOW[1]
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    if TRANSPOSED:
        return -((tap // KW) // SH) * other_width - (tap % KW) // SW
    else:
        return (tap // KW) * other_width + tap % KW


@triton.jit
def _masked_conv_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    partials_ptr,
    positions_ptr,
    bits_ptr,
    count_ptr,
    height,
    width,
    other_height,
    other_width,
    K,
    N,
    weight_tap,
    weight_k,
    weight_n,
    WINDOW: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STATS: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCKS_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[position, n] = sum over taps and k of x[site under the tap, k] weight[tap, k, n], in fp32.

    STATS: partials[tile, 0..2, n] = count, mean, squared deviations of the tile's rows of out; tiles that begin behind
    the last active row write nothing.
    """
    count = tl.load(count_ptr)
    blocks_n = tl.cdiv(N, BLOCK_N)
    tile = tl.cdiv(count, BLOCK_M) - 1 - tl.program_id(0) // blocks_n
    if tile < 0:
        return
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < count
    positions = tl.load(positions_ptr + rows, mask=live, other=0)
    bits = tl.load(bits_ptr + rows, mask=live, other=0)
    corners = _corners(positions, height, width, other_height, other_width, WINDOW, TRANSPOSED)
    if not NARROW:
        corners = corners.to(tl.int64)
    union = tl.reduce(bits, 0, _or)
    packed = tl.zeros((), tl.int64)
    taps = tl.zeros((), tl.int32)
    for v in tl.static_range(WINDOW[0] * WINDOW[1]):
        has = (union >> v) & 1
        packed |= (has * v).to(tl.int64) << (4 * taps).to(tl.int64)
        taps += has
    n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(taps * BLOCKS_K):
        tap = ((packed >> (tl.zeros((), tl.int64) + 4 * (step // BLOCKS_K))) & 15).to(tl.int32)
        k = (step % BLOCKS_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        sites = corners + _step(tap, other_width, WINDOW, TRANSPOSED)
        joined = ((bits >> tap) & 1) != 0
        if EVEN:
            a = tl.load(x_ptr + sites[:, None] * K + k[None, :], mask=joined[:, None], other=0.0)
            b = tl.load(weight_ptr + tap * weight_tap + k[:, None] * weight_k + n[None, :] * weight_n)
        else:
            a = tl.load(x_ptr + sites[:, None] * K + k[None, :], mask=joined[:, None] & (k < K)[None, :], other=0.0)
            inside = (k < K)[:, None] & (n < N)[None, :]
            b = tl.load(
                weight_ptr + tap * weight_tap + k[:, None] * weight_k + n[None, :] * weight_n, mask=inside, other=0.0
            )
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    at = out_ptr + positions.to(tl.int64)[:, None] * N + n[None, :]
    stored = live[:, None] & (n < N)[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=stored)
    if STATS:
        # Sums of the accumulator itself make ptxas wait for each product of the loop (C7514): read it back instead.
        tl.debug_barrier()
        values = tl.load(at, mask=stored, other=0.0).to(tl.float32)
        number = tl.minimum(count - first, BLOCK_M).to(tl.float32)
        mean = tl.sum(values, axis=0) / number
        centred = tl.where(live[:, None], values - mean[None, :], 0.0)
        left = partials_ptr + tile.to(tl.int64) * 3 * N + n
        tl.store(left, tl.zeros((BLOCK_N,), tl.float32) + number, mask=n < N)
        tl.store(left + N, mean, mask=n < N)
        tl.store(left + 2 * N, tl.sum(centred * centred, axis=0), mask=n < N)


@triton.jit
def _chunk_length(pair_counts_ptr, chunks, TAPS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Steps of BLOCK_R pairs a chunk, so that the chunks of all taps are at most `chunks` (which is above TAPS)."""
    steps = tl.zeros((), tl.int32)
    for v in tl.static_range(TAPS):
        steps += tl.cdiv(tl.load(pair_counts_ptr + v), BLOCK_R)
    return tl.maximum(1, tl.cdiv(steps, chunks - TAPS))


@triton.jit
def _masked_conv_weight_kernel(
    x_ptr,
    grad_ptr,
    partials_ptr,
    pairs_ptr,
    pair_counts_ptr,
    sites,
    CI,
    CO,
    chunks,
    TAPS: tl.constexpr,
    UPCAST: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """partials[chunk, o, i] = sum over the chunk's pairs of grad[output, o] x[input, i].

    Grid: blocks of o and i, chunks. Chunks are numbered tap by tap; those behind the last one write nothing. The sites
    of the next pairs are loaded one step ahead and carried, so that they are known when the loads of their rows start;
    the gradient is loaded as [o, rows]: of a transposed tile sm_80 would keep a single buffer.
    """
    blocks_i = tl.cdiv(CI, BLOCK_I)
    o = (tl.program_id(0) // blocks_i) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = (tl.program_id(0) % blocks_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    length = _chunk_length(pair_counts_ptr, chunks, TAPS, BLOCK_R)
    tap, mine, count, before = 0, 0, 0, 0
    for v in tl.static_range(TAPS):
        pairs = tl.load(pair_counts_ptr + v)
        own = tl.cdiv(tl.cdiv(pairs, BLOCK_R), length)
        here = (tl.program_id(1) >= before) & (tl.program_id(1) < before + own)
        tap = tl.where(here, v, tap)
        mine = tl.where(here, tl.program_id(1) - before, mine)
        count = tl.where(here, pairs, count)
        before += own
    if tl.program_id(1) >= before:
        return
    start = mine * length * BLOCK_R
    end = tl.minimum(count, start + length * BLOCK_R)
    outputs_ptr = pairs_ptr + tl.cast(tap, tl.int64) * sites
    inputs_ptr = pairs_ptr + (tl.cast(tap, tl.int64) + TAPS) * sites
    lane = tl.arange(0, BLOCK_R)
    outputs = tl.load(outputs_ptr + start + lane, mask=start + lane < end, other=0)
    inputs = tl.load(inputs_ptr + start + lane, mask=start + lane < end, other=0)
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for r in range(start, end, BLOCK_R):
        ahead = r + BLOCK_R + lane
        next_outputs = tl.load(outputs_ptr + ahead, mask=ahead < end, other=0)
        next_inputs = tl.load(inputs_ptr + ahead, mask=ahead < end, other=0)
        live = r + lane < end
        if not NARROW:
            outputs, inputs = outputs.to(tl.int64), inputs.to(tl.int64)
        g_mask = live[None, :] & (o < CO)[:, None]
        x_mask = live[:, None] & (i < CI)[None, :]
        g = tl.load(grad_ptr + (outputs[None, :] * CO + o[:, None]), mask=g_mask, other=0.0)
        x = tl.load(x_ptr + (inputs[:, None] * CI + i[None, :]), mask=x_mask, other=0.0)
        if UPCAST:
            g = g.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(g, x, acc, input_precision="ieee")
        outputs, inputs = next_outputs, next_inputs
    at = (tl.program_id(1).to(tl.int64) * CO + o[:, None]) * CI + i[None, :]
    tl.store(partials_ptr + at, acc, mask=(o < CO)[:, None] & (i < CI)[None, :])


@triton.jit
def _masked_conv_weight_sum_kernel(
    partials_ptr,
    pair_counts_ptr,
    out_ptr,
    CI,
    CO,
    chunks,
    TAPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[o, tap, i] = sum of the tap's chunks in their order (grid: blocks of o and i, taps)."""
    length = _chunk_length(pair_counts_ptr, chunks, TAPS, BLOCK_R)
    tap = tl.program_id(1)
    first, last = 0, 0
    for v in tl.static_range(TAPS):
        own = tl.cdiv(tl.cdiv(tl.load(pair_counts_ptr + v), BLOCK_R), length)
        first += tl.where(v < tap, own, 0)
        last += tl.where(v <= tap, own, 0)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < CO * CI
    total = tl.zeros((BLOCK,), tl.float32)
    part = partials_ptr + tl.cast(first, tl.int64) * CO * CI
    for _ in range(first, last):
        total += tl.load(part + at, mask=inside, other=0.0)
        part += CO * CI
    tl.store(out_ptr + (at // CI * TAPS + tap) * CI + at % CI, total, mask=inside)


#: Elements a program of the sum over chunks.
BLOCK_SUM = 1024


def statistics_room(x: Tensor, weight: Tensor, sites: int) -> tuple[Tensor, int]:
    """Where `masked_conv` leaves the statistics of its output: partials [tiles, 3, O] float32, and rows a tile."""
    rows = tile(runtime.architecture(x.device), weight.shape[1], weight.shape[0], x.element_size()).block_m
    size = (triton.cdiv(sites, rows), 3, weight.shape[0])
    return torch.empty(size, dtype=torch.float32, device=x.device), rows


def masked_conv(
    x: Tensor,
    weight: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    window: Sequence[int],
    *,
    transposed: bool = False,
    partials: Tensor | None = None,
) -> Tensor:
    """Write the convolution at the listed rows of `out`; with `transposed`, its data gradient.

    Args:
        x: [B, C, h0, w0] channels_last; transposed: the gradient [B, O, h, w] of the output.
        weight: [O, C, kh, kw] of the same dtype, any strides (channels_last reads fastest).
        rows: positions [S] int32 in `out`, bits [S] int32, count [1] int32 (see `ops.masked.lists`).
        out: [B, O, h, w] (transposed: [B, C, h0, w0]) channels_last; only listed rows are written.
        window: rows and columns of kernel, stride and padding: six numbers.
        transposed: data gradient.
        partials: of `statistics_room`, to be filled as far as there are active rows; None: no statistics.
    Returns:
        out.
    """
    k, n = (0, 1) if transposed else (1, 0)
    shape = tile(runtime.architecture(x.device), weight.shape[k], weight.shape[n], x.element_size())
    positions, bits, count = rows
    grid = (triton.cdiv(len(positions), shape.block_m) * triton.cdiv(weight.shape[n], shape.block_n),)
    if not len(positions):
        return out
    taps = weight.contiguous(memory_format=torch.channels_last).flatten(2)
    with runtime.on_device(x.device):
        _masked_conv_kernel[grid](
            x,
            taps,
            out,
            out if partials is None else partials,
            positions,
            bits,
            count,
            *out.shape[2:],
            *x.shape[2:],
            weight.shape[k],
            weight.shape[n],
            taps.stride(2),
            taps.stride(k),
            taps.stride(n),
            WINDOW=tuple(window),
            TRANSPOSED=transposed,
            STATS=partials is not None,
            EVEN=weight.shape[k] % shape.block_k == 0 and weight.shape[n] % shape.block_n == 0,
            UPCAST=runtime.interpreted() and x.dtype == torch.bfloat16,
            NARROW=_narrow(x, taps),
            BLOCKS_K=triton.cdiv(weight.shape[k], shape.block_k),
            BLOCK_M=shape.block_m,
            BLOCK_N=shape.block_n,
            BLOCK_K=shape.block_k,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )
    return out


def masked_conv_weight(x: Tensor, grad: Tensor, listed: tuple[Tensor, Tensor], window: Sequence[int]) -> Tensor:
    """Weight gradient [O, C, kh, kw] float32, channels_last.

    Args:
        x: [B, C, h0, w0] channels_last.
        grad: [B, O, h, w] channels_last, same dtype.
        listed: pairs [2, taps, S] int32, the sites of the outputs and of the inputs that each tap joins, and
            pair_counts [taps] int32.
        window: rows and columns of kernel, stride and padding: six numbers.
    Returns:
        The gradient; sums of chunks are added in a fixed order.
    """
    (pairs, pair_counts), kernel = listed, window[:2]
    taps, channels, outputs = kernel[0] * kernel[1], x.shape[1], grad.shape[1]
    shape = weight_tile(runtime.architecture(x.device), channels, outputs, x.element_size())
    blocks = triton.cdiv(outputs, shape.block_m) * triton.cdiv(channels, shape.block_n)
    chunks = gradient_chunks(blocks, taps, runtime.multiprocessors(x.device), pairs.shape[2], shape.block_k)
    partials = torch.empty(chunks, outputs, channels, dtype=torch.float32, device=x.device)
    total = torch.empty(outputs, *kernel, channels, dtype=torch.float32, device=x.device)
    with runtime.on_device(x.device):
        _masked_conv_weight_kernel[(blocks, chunks)](
            x,
            grad,
            partials,
            pairs,
            pair_counts,
            pairs.shape[2],
            channels,
            outputs,
            chunks,
            TAPS=taps,
            UPCAST=runtime.interpreted() and x.dtype == torch.bfloat16,
            NARROW=_narrow(x, grad),
            BLOCK_O=shape.block_m,
            BLOCK_I=shape.block_n,
            BLOCK_R=shape.block_k,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )
        _masked_conv_weight_sum_kernel[(triton.cdiv(outputs * channels, BLOCK_SUM), taps)](
            partials,
            pair_counts,
            total,
            channels,
            outputs,
            chunks,
            TAPS=taps,
            BLOCK_R=shape.block_k,
            BLOCK=BLOCK_SUM,
        )
    return total.movedim(-1, 1)


def _narrow(*operands: Tensor) -> bool:
    """Whether offsets into the operands, and one map row beyond, fit 32 bits."""
    return all(x.numel() + x.shape[1] * (x.shape[-1] + 1) < 1 << 31 for x in operands)
