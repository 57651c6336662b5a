"""Times of candidate tiles of the queue-loss kernels on the GPU at hand; choose `kernels/queue_losses/tiles.py` from its output.

    python -m bench.sweep [--width 128] [--rows 13312] [--keys 65536]

A candidate whose sums differ from those of the shipped tile by more than 1e-3 is reported as FAIL and not timed; one
that does not fit says so. A winner goes into `kernels/queue_losses/tiles.py` only if bench.aot finds neither stack nor spills.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.queue_losses import ALPHA, TAU_INFO, TAU_KL, unit
from rcmstr_fast.kernels import runtime
from rcmstr_fast.kernels.queue_losses import problem as launcher
from rcmstr_fast.kernels.queue_losses import tiles
from rcmstr_fast.kernels.queue_losses.tiles import Tile

STAGES = (2, 3, 4)
SHAPES = ((64, 32, 4), (64, 64, 4), (64, 64, 8), (64, 128, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8))


def candidates(width: int) -> list[Tile]:
    """Every shape x stages x queries a program that is worth a try at a width."""
    queries = (1, 2) if width <= 128 else (1,)
    return [
        Tile(m, n, warps, stages, q, resident=resident)
        for (m, n, warps), stages, q, resident in itertools.product(SHAPES, STAGES, queries, (1, 2))
        if not (resident == 2 and warps == 8)
    ]


def try_tile(kind: str, tile: Tile, problem: launcher.Problem, extra: tuple, expected: torch.Tensor) -> dict[str, Any]:
    """Check, then time, one pass with one tile."""
    original = tiles.tile
    tiles.tile = lambda *_: tile  # type: ignore[assignment]
    try:
        error = float((problem.launch(kind, extra).sum(0) - expected).norm() / expected.norm())
        if not error < 1e-3:
            return {"status": "FAIL", "error": error}
        return {"status": "ok", **timing.measure(lambda: problem.launch(kind, extra), "cuda", 20)}
    except Exception as error:  # a tile that does not fit is a result
        return {"status": f"{type(error).__name__}: {str(error)[:100]}"}
    finally:
        tiles.tile = original


def main() -> int:
    """Print and store the times of both passes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    for name, value in (("width", 128), ("rows", 13312), ("keys", 65536)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.sweep: needs a CUDA GPU")
        return 2
    rows, width = options.rows, options.width
    query, permuted, key, queue = (unit(n, width, i, "cuda") for i, n in enumerate((rows, rows, rows, options.keys)))
    problem = launcher.level_problem([query, permuted], key, queue, TAU_INFO, TAU_KL, ALPHA)
    _, _, coefficients = problem.row_terms(problem.launch("stats"))
    found = []
    for kind, extra in (("stats", ()), ("gradient", (coefficients,))):
        shipped = tiles.tile(kind, runtime.architecture(query.device), width, 2)
        expected = problem.launch(kind, extra).sum(0)
        for tile in [shipped, *candidates(width)]:
            row = {"kind": kind, "tile": vars(tile), "shipped": tile == shipped}
            found.append(row | try_tile(kind, tile, problem, extra, expected))
            print(json.dumps(found[-1]), flush=True)
    machine = timing.describe("cuda")
    path = Path(__file__).parent / "results" / machine["gpu"].replace(" ", "-").lower() / f"sweep-d{width}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
