"""Sparse convolution over active rows of dense channels_last maps: forward, data gradient and weight gradient.

Maps stay where the dense convolution has them. A list gives the position of each active site (a row of the matrix
product) and a 9-bit word of the taps, the places of the kernel, under which an active input lies. Rows are sorted by
that word, so a tile of BLOCK_M rows skips the taps that none of its rows has. The taps of a tile are packed into one
64-bit integer, and one loop runs over pairs of tap and channel block. Addresses are arithmetic on the position; an
index loaded in the loop would break the pipelining of the loads. What inactive sites hold is never loaded, and inactive
outputs are never written.

The data gradient is the forward kernel over the list of the inputs with the weight matrix transposed: input site i
meets output site o under tap v exactly if o meets i under v. The weight gradient of a tap is a sum over the list of the
outputs that have the tap; it is taken in `splits` parts, which are added in a fixed order.

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
from rcmstr_fast.kernels.masked.tiles import gradient_splits, tile, weight_tile


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
    first = (tl.program_id(0) // blocks_n) * BLOCK_M
    if first >= count:
        return
    rows = first + tl.arange(0, BLOCK_M)
    live = rows < count
    positions = tl.load(positions_ptr + rows, mask=live, other=0)
    bits = tl.load(bits_ptr + rows, mask=live, other=0)
    corners = _corners(positions, height, width, other_height, other_width, WINDOW, TRANSPOSED).to(tl.int64)
    union = tl.reduce(bits, 0, _or)
    packed = tl.zeros((), tl.int64)
    taps = tl.zeros((), tl.int32)
    for v in tl.static_range(WINDOW[0] * WINDOW[1]):
        has = (union >> v) & 1
        packed |= (has * v).to(tl.int64) << (4 * taps).to(tl.int64)
        taps += has
    n = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(taps * blocks_k):
        tap = ((packed >> (4 * (step // blocks_k)).to(tl.int64)) & 15).to(tl.int32)
        k = (step % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
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
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + positions.to(tl.int64)[:, None] * N + n[None, :], out, mask=live[:, None] & (n < N)[None, :])
    if STATS:
        stored = out.to(tl.float32)  # 0 in rows that are not live
        number = tl.minimum(count - first, BLOCK_M).to(tl.float32)
        mean = tl.sum(stored, axis=0) / number
        centred = tl.where(live[:, None], stored - mean[None, :], 0.0)
        at = partials_ptr + (tl.program_id(0) // blocks_n).to(tl.int64) * 3 * N + n
        tl.store(at, tl.zeros((BLOCK_N,), tl.float32) + number, mask=n < N)
        tl.store(at + N, mean, mask=n < N)
        tl.store(at + 2 * N, tl.sum(centred * centred, axis=0), mask=n < N)


@triton.jit
def _masked_conv_weight_kernel(
    x_ptr,
    grad_ptr,
    partials_ptr,
    pairs_ptr,
    pair_counts_ptr,
    sites,
    height,
    width,
    other_height,
    other_width,
    CI,
    CO,
    splits,
    WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """partials[split, o, tap, i] = sum over a part of the tap's outputs of grad[output, o] x[input, i].

    The position of the next rows is loaded one step ahead and carried, so that it is known when their loads start; the
    gradient is loaded as [o, rows]: of a transposed tile sm_80 would keep a single buffer.
    """
    blocks_i = tl.cdiv(CI, BLOCK_I)
    o = (tl.program_id(0) // blocks_i) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = (tl.program_id(0) % blocks_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    tap = tl.program_id(1)
    count = tl.load(pair_counts_ptr + tap)
    part = tl.cdiv(tl.cdiv(count, splits), BLOCK_R) * BLOCK_R
    start = tl.program_id(2) * part
    end = tl.minimum(count, start + part)
    offset = _step(tap, other_width, WINDOW, False)
    pairs_ptr += tap.to(tl.int64) * sites
    lane = tl.arange(0, BLOCK_R)
    positions = tl.load(pairs_ptr + start + lane, mask=start + lane < end, other=0)
    acc = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for r in range(start, end, BLOCK_R):
        later = tl.load(pairs_ptr + r + BLOCK_R + lane, mask=r + BLOCK_R + lane < end, other=0)
        live = r + lane < end
        inputs = _corners(positions, height, width, other_height, other_width, WINDOW, False) + offset
        g_mask = live[None, :] & (o < CO)[:, None]
        x_mask = live[:, None] & (i < CI)[None, :]
        g = tl.load(grad_ptr + positions.to(tl.int64)[None, :] * CO + o[:, None], mask=g_mask, other=0.0)
        x = tl.load(x_ptr + inputs.to(tl.int64)[:, None] * CI + i[None, :], mask=x_mask, other=0.0)
        if UPCAST:
            g = g.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(g, x, acc, input_precision="ieee")
        positions = later
    at = ((tl.program_id(2).to(tl.int64) * CO + o[:, None]) * (WINDOW[0] * WINDOW[1]) + tap) * CI + i[None, :]
    tl.store(partials_ptr + at, acc, mask=(o < CO)[:, None] & (i < CI)[None, :])


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
        listed: pairs [taps, S] int32, the positions of the outputs that have each tap, and pair_counts [taps] int32.
        window: rows and columns of kernel, stride and padding: six numbers.
    Returns:
        The gradient; sums of parts are added in a fixed order.
    """
    (pairs, pair_counts), kernel = listed, window[:2]
    taps, channels, outputs = kernel[0] * kernel[1], x.shape[1], grad.shape[1]
    shape = weight_tile(runtime.architecture(x.device), channels, outputs, x.element_size())
    blocks = triton.cdiv(outputs, shape.block_m) * triton.cdiv(channels, shape.block_n)
    splits = gradient_splits(blocks * taps, runtime.multiprocessors(x.device), pairs.shape[1], shape.block_k)
    partials = torch.empty(splits, outputs, *kernel, channels, dtype=torch.float32, device=x.device)
    with runtime.on_device(x.device):
        _masked_conv_weight_kernel[(blocks, taps, splits)](
            x,
            grad,
            partials,
            pairs,
            pair_counts,
            pairs.shape[1],
            *grad.shape[2:],
            *x.shape[2:],
            channels,
            outputs,
            splits,
            WINDOW=tuple(window),
            UPCAST=runtime.interpreted() and x.dtype == torch.bfloat16,
            BLOCK_O=shape.block_m,
            BLOCK_I=shape.block_n,
            BLOCK_R=shape.block_k,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )
    total = partials[0] if splits == 1 else partials.sum(0)
    return total.movedim(-1, 1)
