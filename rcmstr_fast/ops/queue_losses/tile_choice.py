"""Which tile each part of the queue-loss kernels uses here, chosen by timing.

The candidates are the tile that the table has for this family of GPUs, those that it has at the same width for the
other families, and its own with half as many keys, with one pipeline stage less, or with the other way to form addresses.
"""

from dataclasses import replace
from functools import partial

import torch

from rcmstr_fast.kernels.queue_losses import tiles
from rcmstr_fast.kernels.queue_losses.tiles import Tile
from rcmstr_fast.ops import tile_choice
from rcmstr_fast.tuning.choices import Choice, Setting

#: Narrowest step along the queue that the matrix units take.
_LEAST_STEP = 16


def _place(table: dict[tuple[int, int, int], Tile], setting: Setting) -> tile_choice.Key | None:
    """Where the tile of the run's levels stands, or None where no kernel runs them."""
    if setting.calls.get("relational_losses", ())[:1] != ("triton",):
        return None
    from rcmstr_fast.kernels import runtime  # needs triton

    family, width = runtime.architecture(torch.device(setting.device)), int(setting.config.model.feature_dim)
    keys = [(family, width, queries) for queries in (2, 1) if (family, width, queries) in table]
    return keys[0] if keys else None


def _others(table: dict[tuple[int, int, int], Tile], key: tile_choice.Key, own: Tile) -> list[Tile]:
    """Tiles of other families for the same rows, a narrower step, a stage less, and the other way to form addresses."""
    found = [tile for (_, width, queries), tile in table.items() if (width, queries) == key[1:]]
    found += [replace(own, block_n=own.block_n // 2)] if own.block_n > _LEAST_STEP else []
    found += [replace(own, num_stages=own.num_stages - 1)] if own.num_stages > 1 else []
    return [*found, replace(own, kept=not own.kept)]


def _declare(kind: str, table: dict[tuple[int, int, int], Tile], gain: float) -> Choice:
    return tile_choice.declare(
        f"relational_losses.tile_{kind}",
        f"tile of the losses' {kind} pass",
        "relational_losses",
        gain,
        table,
        partial(_place, table),
        partial(_others, table),
        ("relational_losses", "triton"),
    )


STATS = _declare("stats", tiles.STATS, 1.09)
GRADIENT = _declare("gradient", tiles.GRADIENT, 1.14)
