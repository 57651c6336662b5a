"""Tile shapes of the masked convolution; no torch, no triton.

Chosen by ahead-of-time builds (no stack, no spills, the intended pipeline buffers: tests/kernels/test_aot.py); times on
a GPU may choose others.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvTile:
    """One configuration.

    Attributes:
        block_m: rows a program (weight gradient: output channels).
        block_n: output channels a program (weight gradient: input channels).
        block_k: input channels a step (weight gradient: rows).
        num_warps: warps a program.
        num_stages: pipeline stages.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


#: (family of `architectures`, output channels up to) -> tile of 2-byte operands; block_k shrinks with few input channels.
ROWS = {
    (80, 128): ConvTile(128, 128, 64, 8, 4),
    (80, 64): ConvTile(128, 64, 64, 4, 3),
    (80, 32): ConvTile(128, 32, 64, 4, 3),
    (80, 16): ConvTile(128, 16, 64, 4, 3),
    (86, 128): ConvTile(128, 128, 64, 8, 4),
    (86, 64): ConvTile(128, 64, 64, 4, 3),
    (86, 32): ConvTile(128, 32, 64, 4, 3),
    (86, 16): ConvTile(128, 16, 64, 4, 3),
    (90, 256): ConvTile(128, 256, 64, 8, 3),
    (90, 128): ConvTile(128, 128, 64, 8, 3),
    (90, 64): ConvTile(128, 64, 64, 4, 3),
    (90, 32): ConvTile(128, 32, 64, 4, 3),
    (90, 16): ConvTile(128, 16, 64, 4, 3),
    (100, 256): ConvTile(128, 256, 64, 8, 3),
    (100, 128): ConvTile(128, 128, 64, 8, 3),
    (100, 64): ConvTile(128, 64, 64, 4, 3),
    (100, 32): ConvTile(128, 32, 64, 4, 3),
    (100, 16): ConvTile(128, 16, 64, 4, 3),
}
#: Channels from which on a layer takes the largest tile of the weight gradient.
WIDEST = 128
#: 4-byte operands: exact products without tensor cores.
WIDE = ConvTile(32, 32, 32, 4, 2)
#: (family, WIDEST) -> tile of the weight gradient; smaller matrices take a part of it.
WEIGHT = {
    (80, WIDEST): ConvTile(128, 128, 32, 8, 4),
    (86, WIDEST): ConvTile(128, 128, 32, 8, 4),
    (90, WIDEST): ConvTile(128, 128, 64, 8, 3),
    (100, WIDEST): ConvTile(128, 128, 64, 8, 3),
}


def _power(size: int, largest: int) -> int:
    """The power of two from 16 to `largest` that covers `size`, or `largest`."""
    return min(largest, max(16, 1 << (size - 1).bit_length()))


def tile(family: int, in_channels: int, out_channels: int, itemsize: int) -> ConvTile:
    """The tile of the forward and of the data gradient."""
    if itemsize > 2:
        return WIDE
    largest = max(n for arch, n in ROWS if arch == family)
    shape = ROWS[family, _power(out_channels, largest)]
    block_k = _power(in_channels, shape.block_k)
    return ConvTile(shape.block_m, shape.block_n, block_k, shape.num_warps, shape.num_stages)


def weight_tile(family: int, in_channels: int, out_channels: int, itemsize: int) -> ConvTile:
    """The tile of the weight gradient."""
    if itemsize > 2:
        return WIDE
    shape = WEIGHT[family, WIDEST]
    block_m = max(64, _power(out_channels, shape.block_m))  # wgmma needs 64 rows
    block_n = _power(in_channels, shape.block_n)
    small = block_m * block_n < 128 * 128
    return ConvTile(block_m, block_n, shape.block_k, 4 if small else shape.num_warps, shape.num_stages)


def gradient_chunks(blocks: int, taps: int, multiprocessors: int, rows: int, block_k: int) -> int:
    """Chunks of the weight gradient's pairs, above `taps`: with all blocks of the matrix about four programs a
    multiprocessor, and at least four steps each if every tap had all `rows`.

    A tap's last chunk is cut short by its pairs, which costs at most `taps` chunks more than equal ones.
    """
    wanted = -(-4 * multiprocessors // max(1, blocks))
    return taps + max(1, min(wanted, taps * rows // (4 * block_k), 128))
