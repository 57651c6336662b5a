"""Predicted times of the kernels of a training step, from what they compile to; no GPU is needed.

The shapes are those of RCMSTR with the CNN at B = 512, 32 x 100: five loss terms over queues of 65,536 rows, and the
masked pass of the two stages where a ResNet spends its time, 70 % hidden. A kernel's time is its main loop's cycles for
an iteration (`simulate`; `sass.bounds` beside it) times the iterations of the program that ends last, where free
programs' places take programs in their order. Clocks are those that the machines keep under such a load.
"""

import heapq
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.aot import sass, simulate
from bench.aot.build import build
from rcmstr_fast import ops
from rcmstr_fast.kernels.masked import tiles as masked_tiles
from rcmstr_fast.kernels.queue_losses import tiles
from rcmstr_fast.kernels.shipped import configurations
from rcmstr_fast.ops.masked.layers import Window
from rcmstr_fast.ops.masked.lists import sorted_rows, tap_pairs, tap_words

Row = dict[str, Any]
BATCH, FRAMES, STRIPS, WIDTH, KEYS, HIDDEN = 512, 26, 4, 128, 65536, 0.7
#: Pairs of a subword's window and its frames.
PAIRS_A_PICTURE = 28
#: Iterations' worth of a program's start and end.
ENDS = 4


@dataclass(frozen=True)
class Machine:
    """A GPU.

    Attributes:
        name: of the product.
        architecture: of its code.
        multiprocessors: number.
        ghz: clock under load.
        dense: flop/s that cuDNN is taken to reach in the dense convolutions of these shapes.
        goal: ms of all loss terms, and least ratio of dense to sparse time of the masked pass.
    """

    name: str
    architecture: int
    multiprocessors: int
    ghz: float
    dense: float
    goal: tuple[float, float]


MACHINES = (
    Machine("H200", 90, 132, 1.755, 593e12, (5.2, 5.0)),
    Machine("A100", 80, 108, 1.41, 188e12, (15.0, 5.0)),
)
#: (rows, queries) of the levels and of the terms between levels.
LEVELS = {"frame": BATCH * FRAMES, "subword": BATCH * STRIPS, "word": BATCH}
BETWEEN = {"frame to subword": BATCH * PAIRS_A_PICTURE, "subword to word": BATCH * STRIPS}
#: (height, width, channels) of a stage.
STAGES = ((4, 26, 512), (8, 25, 256))


@dataclass(frozen=True)
class Loop:
    """What an iteration of a kernel's main loop takes.

    Attributes:
        counts: instructions by pipe.
        bounds: cycles by pipe; `bound` is the longest.
        cycles: simulated, of a multiprocessor for one program's iteration, and never less than `bound`.
        programs: that share a multiprocessor.
    """

    counts: dict[str, int]
    bounds: dict[str, float]
    cycles: float
    programs: int

    @property
    def bound(self) -> float:
        """The longest of the bounds."""
        return max(self.bounds.values())


def loop_of(name: str, machine: Machine) -> Loop:
    """The main loop of a shipped configuration, in the form that training runs."""
    configuration = next(c for c in configurations() if c.name == f"{name}_sm{machine.architecture}")
    built = build(configuration)
    body = [sass.parse(text) for text in sass.main_loop(built.sass)]
    warps = configuration.num_warps
    fit = 65536 // (-(-built.row["registers"] // 8) * 8 * 32 * warps)
    fit = min(fit, configuration.target.together // (built.row["shared"] + 1024))
    found = sass.bounds(body, warps, machine.architecture)
    alone = dict(warps=warps, architecture=machine.architecture)
    cycles = max(simulate.cycles(body, programs=fit, **alone), *found.values())
    return Loop(sass.counts(body), found, cycles, fit)


def last_end(lengths: Iterable[float], places: int) -> float:
    """When the last program ends, each place taking the next program when it is free."""
    ends = [0.0] * places
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def _ms(iterations: Iterable[float], loop: Loop, machine: Machine, cycles: float | None = None) -> float:
    """Time of programs of so many iterations each."""
    places = machine.multiprocessors * loop.programs
    each = (loop.cycles if cycles is None else cycles) * loop.programs
    return last_end((n + ENDS for n in iterations), places) * each / (machine.ghz * 1e6)


def _row(machine: Machine, what: str, kernel: str, loop: Loop, programs: list[float]) -> Row:
    ideal = sum(programs) / machine.multiprocessors / (machine.ghz * 1e6)
    return {
        "machine": machine.name,
        "part": what,
        "kernel": kernel,
        "instructions": loop.counts,
        "cycles": {name: round(value) for name, value in loop.bounds.items()},
        "simulated": round(loop.cycles),
        "programs": loop.programs,
        "bound_ms": round(ideal * loop.bound, 3),
        "ms": round(_ms(programs, loop, machine), 3),
    }


def loss_rows(machine: Machine) -> list[Row]:
    """Both passes of the five loss terms."""
    made = []
    for kind in ("stats", "gradient"):
        for form, queries, terms in (("root", 2, LEVELS), ("kl", 1, BETWEEN)):
            name = f"{kind}_{form}_d{WIDTH}_q{queries}_whole_by16"
            tile = tiles.tile(kind, machine.architecture, WIDTH, queries)
            loop, programs = loop_of(name, machine), []
            for rows in terms.values():
                row_tiles, steps = math.ceil(rows / tile.block_m), KEYS // tile.block_n
                width = 5 if kind == "stats" else WIDTH
                places = machine.multiprocessors * tile.resident
                parts = tiles.split(row_tiles, steps, places, 4 * queries * rows * width)
                programs += [math.ceil(steps / parts)] * (row_tiles * parts)
            made.append(_row(machine, "losses", name, loop, programs))
    return made


def masked_rows(machine: Machine) -> list[Row]:
    """Forward with statistics, data gradient and weight gradient of one 3 x 3 layer of each stage."""
    made = []
    for height, width, channels in STAGES:
        tiles_of, pairs = _lists(height, width, machine, channels)
        shape = masked_tiles.tile(machine.architecture, channels, channels, 2)
        steps, blocks = channels // shape.block_k, max(1, channels // shape.block_n)
        rows = [float(n * steps) for n in tiles_of for _ in range(blocks)]
        for way in ("stats", "dgrad"):
            kernel = f"masked_conv_{way}_k3_{_form(channels)}"
            made.append(_row(machine, _stage(height, width, channels), kernel, loop_of(kernel, machine), rows))
        kernel = f"masked_conv_wgrad_k3_{_form(channels)}"
        weight, loop = masked_tiles.weight_tile(machine.architecture, channels, channels, 2), loop_of(kernel, machine)
        blocks = math.ceil(channels / weight.block_m) * math.ceil(channels / weight.block_n)
        sites = BATCH * height * width
        chunks = masked_tiles.gradient_chunks(blocks, 9, machine.multiprocessors, sites, weight.block_k)
        steps_of = [math.ceil(n / weight.block_k) for n in pairs]
        length = max(1, math.ceil(sum(steps_of) / (chunks - 9)))
        cut = [float(min(length, n - at)) for n in steps_of for at in range(0, n, length)]
        programs = [n for n in cut for _ in range(blocks)]
        made.append(_row(machine, _stage(height, width, channels), kernel, loop, programs))
    return made


def _form(channels: int) -> str:
    """The shipped form with the same tile and loop: sizes differ only in the number of iterations."""
    return "512_512" if channels >= 256 else f"{channels}_{channels}"


def _stage(height: int, width: int, channels: int) -> str:
    return f"{height}x{width}x{channels}"


def _lists(height: int, width: int, machine: Machine, channels: int) -> tuple[list[int], list[int]]:
    """Taps of each tile of the forward, in the order of the programs, and pairs of each tap."""
    masks = ops.draw_masks(
        torch.arange(BATCH),
        seed=0,
        epoch=0,
        size=(32, 100),
        unit="stage3",
        mask_ratio=HIDDEN,
        num_blocks=0,
        backend="reference",
    )
    sites = ops.active_sites(masks.grid, [(32, 100), (16, 50), (8, 25), (4, 26)], "anchored")
    active = next(s.active for s in sites if s.active.shape[2:] == (height, width))
    window = Window((3, 3), (1, 1), (1, 1))
    words, _ = tap_words(active, active, window)
    _, bits, count = sorted_rows(active, words, window.taps)
    _, counts = tap_pairs(words, window, (height, width))
    block = masked_tiles.tile(machine.architecture, channels, channels, 2).block_m
    union = []
    for part in bits[: int(count)].split(block):
        joined = 0
        for word in set(part.tolist()):
            joined |= word
        union.append(joined.bit_count())
    return union[::-1], counts.tolist()


def dense_ms(machine: Machine, height: int, width: int, channels: int) -> float:
    """The three products of a dense layer at the rate that cuDNN is taken to reach."""
    return 3e3 * 2 * BATCH * height * width * 9 * channels**2 / machine.dense


def totals(rows: list[Row]) -> list[Row]:
    """All loss terms, and each stage of the masked pass against its dense layer, beside the goals."""
    made: list[Row] = []
    for machine in MACHINES:
        mine = [row for row in rows if row["machine"] == machine.name]
        loss = [row for row in mine if row["part"] == "losses"]
        both = {name: round(sum(row[name] for row in loss), 2) for name in ("bound_ms", "ms")}
        made.append({"machine": machine.name, "what": "five loss terms", **both, "goal": f"{machine.goal[0]} ms"})
        for stage in STAGES:
            layer = [row for row in mine if row["part"] == _stage(*stage)]
            dense, ms = dense_ms(machine, *stage), sum(row["ms"] for row in layer)
            made.append(
                {
                    "machine": machine.name,
                    "what": f"masked {_stage(*stage)}",
                    "ms": round(ms, 3),
                    "bound_ms": round(sum(row["bound_ms"] for row in layer), 3),
                    "dense_ms": round(dense, 2),
                    "ratio": round(dense / ms, 2),
                    "goal": f"{machine.goal[1]:g} x dense",
                }
            )
    return made


def write(path: Path) -> int:
    """Predict everything and write the record; what it says of former kernels ("before", "tried") stays."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = [row for machine in MACHINES for row in (*loss_rows(machine), *masked_rows(machine))]
    record = {"kernels": rows, "totals": totals(rows), **{name: kept.get(name, []) for name in ("before", "tried")}}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in record["totals"]:
        print(row)
    return 0
