"""Tile shapes of the queue-loss kernels, when a kernel may run, and how work is cut; no torch, no triton.

Shapes were chosen by ahead-of-time builds (no stack, no spills, the pipeline buffers they ask for, two
programs a multiprocessor where that fits): bench/results/aot/ holds the table, tests/kernels/test_aot.py checks it.
Times on a GPU may choose others.
"""

import functools
import heapq
import math
from dataclasses import dataclass
from fractions import Fraction

WIDTHS = (64, 128, 256, 512)
#: From this temperature on e^{s / tau} of unit rows, and sums of 2^24 of them, stay inside fp32.
MIN_TAU = 0.015
#: fp32 partial gradients of one launch stay below this, whatever the split.
WORKSPACE_BYTES = 96 << 20


@dataclass(frozen=True)
class Tile:
    """One configuration of the stats or gradient kernel.

    Attributes:
        block_m: rows a program.
        block_n: queue rows a step.
        num_warps: warps a program.
        num_stages: software-pipeline stages of the loop over the queue.
        queries: queries a program, 1 or 2 (the second shares the key's similarities).
        block_d: gradient columns a program; 0 for all of D.
        resident: programs that fit a multiprocessor together.
        folded: the gradient takes a coefficient into an exponent (see `similarity`).
        kept: offsets of the queue's rows wait in registers from step to step; else every step forms them.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    queries: int
    block_d: int = 0
    resident: int = 1
    folded: bool = False
    kept: bool = False


def power_ratio(tau_info: float, tau_kl: float) -> tuple[int, int]:
    """(N_INFO, N_KL), at most 8 each, with N_INFO tau_info = N_KL tau_kl; (0, 0) where there is none."""
    ratio = Fraction(tau_info / tau_kl).limit_denominator(8)
    exact = ratio > 0 and math.isclose(float(ratio), tau_info / tau_kl, rel_tol=1e-9)
    return (ratio.denominator, ratio.numerator) if exact and ratio.numerator <= 8 else (0, 0)


def split(row_tiles: int, key_tiles: int, slots: int, bytes_a_part: int) -> int:
    """Parts of the queue so that row_tiles x parts programs fill `slots` programs at a time in whole waves.

    The smallest number with waves at least 95 % full, else the fullest; at most 64, at most `key_tiles`, and within
    `WORKSPACE_BYTES`. A pure function of shapes and device: results repeat bit for bit.
    """
    most = max(1, min(64, key_tiles, WORKSPACE_BYTES // max(1, bytes_a_part)))
    best, fullest = 1, 0.0
    for parts in range(1, most + 1):
        waves = row_tiles * parts / slots
        full = waves / math.ceil(waves)
        if full > fullest + 1e-9:
            best, fullest = parts, full
        if fullest >= 0.95:
            break
    return best


@dataclass(frozen=True)
class Work:
    """What one term adds to a scheduled launch.

    Attributes:
        programs: programs that walk over the queue (row tiles x layers).
        key_tiles: steps of a walk over the whole queue.
        cost: of a step, in similarities.
        bytes_a_part: partial results of one part of the queue.
    """

    programs: int
    key_tiles: int
    cost: float
    bytes_a_part: int


def _makespan(work: tuple[Work, ...], parts: list[int], slots: int) -> float:
    """Time until the last program ends where free slots take programs in the order of the terms."""
    ends = [0.0] * slots
    for term, count in zip(work, parts):
        length = term.cost * math.ceil(term.key_tiles / count)
        for _ in range(term.programs * math.ceil(term.key_tiles / math.ceil(term.key_tiles / count))):
            heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


@functools.lru_cache(maxsize=64)
def schedule(work: tuple[Work, ...], slots: int) -> tuple[int, ...]:
    """Parts of the queue for each term so that the programs of all terms together keep `slots` programs busy.

    Programs are cut to about equal length, shorter until the slots are busy 95 % of the time; at most 64 parts, at most
    `key_tiles`, and all partial results within `WORKSPACE_BYTES`. A pure function of shapes and device.
    """
    total = sum(term.programs * term.key_tiles * term.cost for term in work)
    best, fullest = (1,) * len(work), 0.0
    for waves in range(1, 65):
        length = total / (slots * waves)
        parts = [min(64, term.key_tiles, max(1, math.ceil(term.key_tiles * term.cost / length))) for term in work]
        if max(parts) > 1 and sum(term.bytes_a_part * n for term, n in zip(work, parts)) > WORKSPACE_BYTES:
            break
        full = total / (slots * _makespan(work, parts, slots))
        if full > fullest + 1e-9:
            best, fullest = tuple(parts), full
        if fullest >= 0.95 or all(n == min(64, term.key_tiles) for term, n in zip(work, parts)):
            break
    return best


#: (family of `architectures`, D, queries a program) -> tile of the stats pass.
STATS = {
    (80, 64, 1): Tile(64, 64, 4, 3, 1, resident=2),
    (80, 64, 2): Tile(64, 64, 4, 3, 2, resident=2),
    (80, 128, 1): Tile(64, 32, 4, 2, 1, resident=4, kept=True),
    (80, 128, 2): Tile(64, 64, 4, 3, 2, resident=2),
    (80, 256, 1): Tile(128, 32, 8, 3, 1),
    (80, 512, 1): Tile(64, 32, 4, 2, 1),
    (86, 64, 1): Tile(64, 64, 4, 3, 1, resident=2),
    (86, 64, 2): Tile(64, 64, 4, 3, 2, resident=2),
    (86, 128, 1): Tile(64, 64, 4, 3, 1),
    (86, 128, 2): Tile(64, 32, 4, 3, 2),
    (86, 256, 1): Tile(64, 32, 4, 2, 1),
    (86, 512, 1): Tile(32, 32, 4, 2, 1),
    (90, 64, 1): Tile(128, 64, 8, 3, 1, resident=2),
    (90, 64, 2): Tile(128, 64, 8, 3, 2),
    (90, 128, 1): Tile(128, 64, 8, 3, 1, resident=2),
    (90, 128, 2): Tile(64, 64, 4, 3, 2, resident=2),
    (90, 256, 1): Tile(128, 64, 8, 3, 1),
    (90, 512, 1): Tile(64, 32, 4, 2, 1),
    (100, 64, 1): Tile(128, 64, 8, 3, 1),
    (100, 64, 2): Tile(128, 64, 8, 3, 2),
    (100, 128, 1): Tile(128, 64, 8, 3, 1),
    (100, 128, 2): Tile(128, 32, 8, 3, 2),
    (100, 256, 1): Tile(128, 32, 8, 2, 1),
    (100, 512, 1): Tile(64, 16, 8, 2, 1),
}
#: (family, D, queries a program) -> tile of the gradient pass.
GRADIENT = {
    (80, 64, 1): Tile(64, 64, 4, 3, 1, resident=2),
    (80, 64, 2): Tile(64, 32, 4, 3, 2, resident=2),
    (80, 128, 1): Tile(64, 64, 4, 2, 1, resident=2, folded=True, kept=True),
    (80, 128, 2): Tile(128, 32, 8, 3, 2),
    (80, 256, 1): Tile(64, 64, 8, 2, 1),
    (80, 512, 1): Tile(32, 32, 4, 2, 1, block_d=256, kept=True),
    (86, 64, 1): Tile(64, 64, 4, 3, 1, resident=2),
    (86, 64, 2): Tile(64, 32, 4, 3, 2, resident=2),
    (86, 128, 1): Tile(64, 64, 4, 3, 1),
    (86, 128, 2): Tile(64, 64, 8, 2, 2),
    (86, 256, 1): Tile(64, 32, 8, 2, 1),
    (86, 512, 1): Tile(32, 16, 4, 2, 1, block_d=256, kept=True),
    (90, 64, 1): Tile(128, 64, 8, 3, 1),
    (90, 64, 2): Tile(128, 64, 8, 3, 2),
    (90, 128, 1): Tile(64, 64, 4, 2, 1, resident=2),
    (90, 128, 2): Tile(128, 64, 8, 3, 2, folded=True),
    (90, 256, 1): Tile(128, 32, 8, 2, 1),
    (90, 512, 1): Tile(64, 32, 8, 1, 1, block_d=256),
    (100, 64, 1): Tile(128, 64, 8, 3, 1),
    (100, 64, 2): Tile(128, 64, 8, 3, 2),
    (100, 128, 1): Tile(128, 64, 8, 3, 1),
    (100, 128, 2): Tile(128, 64, 8, 3, 2),
    (100, 256, 1): Tile(128, 32, 8, 2, 1),
    (100, 512, 1): Tile(64, 32, 8, 1, 1, block_d=256),
}


def tile(kind: str, family: int, width: int, queries: int) -> Tile:
    """The tile of "stats" or "gradient" of a family for `queries` (1 or 2) queries of `width` columns."""
    table = STATS if kind == "stats" else GRADIENT
    shared = 2 if queries == 2 and (family, width, 2) in table else 1
    return table[family, width, shared]


#: Families whose launch of a pass can hold levels and pairs at a D: elsewhere the two bodies in one kernel spill
#: (ahead-of-time builds).
SCHEDULED = {
    ("stats", 64): (80, 86, 90, 100),
    ("stats", 128): (80, 86, 90, 100),
    ("gradient", 64): (80, 86, 90, 100),
    ("gradient", 128): (90, 100),
}
