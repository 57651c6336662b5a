"""Which tile each part of the queue-loss kernels uses here, chosen by timing.

The candidates are the tile that the table has for this family of GPUs, those that it has at the same width for the
other families, and its own with half as many keys or with one pipeline stage less.
"""

from collections.abc import Callable
from dataclasses import astuple, fields, replace

import torch

from rcmstr_fast.kernels.queue_losses import tiles
from rcmstr_fast.kernels.queue_losses.tiles import Tile
from rcmstr_fast.tuning import choices
from rcmstr_fast.tuning.choices import Choice, Setting, Value

_Key = tuple[int, int, int]
_NUMBERS = len(fields(Tile))
#: Narrowest step along the queue that the matrix units take.
_LEAST_STEP = 16


def write(key: _Key, tile: Tile) -> str:
    """A place of a table and the tile for it, as a record keeps them."""
    return ",".join(str(int(x)) for x in (*key, *astuple(tile)))


def read(value: str) -> tuple[_Key, Tile]:
    """The inverse of `write`."""
    numbers = [int(word) for word in value.split(",")]
    assert len(numbers) == 3 + _NUMBERS
    block_m, block_n, warps, stages, queries, block_d, resident, folded = numbers[3:]
    tile = Tile(block_m, block_n, warps, stages, queries, block_d, resident, bool(folded))
    return (numbers[0], numbers[1], numbers[2]), tile


def _declare(kind: str, table: dict[_Key, Tile], gain: float) -> Choice:
    def place(setting: Setting) -> _Key | None:
        """Where the tile of the run's levels stands, or None where no kernel runs them."""
        if setting.calls.get("relational_losses", ())[:1] != ("triton",):
            return None
        from rcmstr_fast.kernels import runtime  # needs triton

        family, width = runtime.architecture(torch.device(setting.device)), int(setting.config.model.feature_dim)
        keys = [(family, width, queries) for queries in (2, 1) if (family, width, queries) in table]
        return keys[0] if keys else None

    def candidates(setting: Setting) -> list[Value]:
        key = place(setting)
        if key is None:
            return []
        own = table[key]
        others = [tile for (_, width, queries), tile in table.items() if (width, queries) == key[1:]]
        others += [replace(own, block_n=own.block_n // 2)] if own.block_n > _LEAST_STEP else []
        others += [replace(own, num_stages=own.num_stages - 1)] if own.num_stages > 1 else []
        return list(dict.fromkeys(write(key, tile) for tile in (own, *others)))

    def prior(setting: Setting) -> Value:
        key = place(setting)
        return "" if key is None else write(key, table[key])

    def shown(value: Value) -> str:
        tile = read(str(value))[1]
        return f"{tile.block_m}x{tile.block_n} w{tile.num_warps} s{tile.num_stages}"

    def apply(value: str) -> Callable[[], None]:
        key, tile = read(value)
        before = table[key]
        table[key] = tile
        return lambda: table.update({key: before})

    return choices.declare(
        Choice(
            f"relational_losses.tile_{kind}",
            f"tile of the losses' {kind} pass",
            "relational_losses",
            gain,
            candidates,
            prior,
            show=shown,
            apply=apply,
            verify=("relational_losses", "triton"),
        )
    )


STATS = _declare("stats", tiles.STATS, 1.09)
GRADIENT = _declare("gradient", tiles.GRADIENT, 1.14)
