"""The choice of an entry of a table of tiles: the table's own tile, and others that are tried in its place."""

from collections.abc import Callable, Iterable
from dataclasses import astuple, fields
from typing import Any, TypeVar

from rcmstr_fast.tuning import choices
from rcmstr_fast.tuning.choices import Choice, Setting, Value

#: Numbers that name an entry of a table.
Key = tuple[int, ...]
Tile = TypeVar("Tile")


def write(key: Key, tile: Any) -> str:
    """An entry of a table and the tile for it, as a record keeps them."""
    return ",".join(str(int(x)) for x in (*key, *astuple(tile)))


def read(value: str, like: Tile) -> tuple[Key, Tile]:
    """The inverse of `write` for tiles of the type of `like`."""
    numbers, names = [int(word) for word in value.split(",")], [f.name for f in fields(like)]  # type: ignore[arg-type]
    key, own = numbers[: -len(names)], numbers[-len(names) :]
    return tuple(key), type(like)(*(type(getattr(like, name))(x) for name, x in zip(names, own, strict=True)))


def declare(
    name: str,
    about: str,
    part: str,
    gain: float,
    table: dict[Any, Tile],
    place: Callable[[Setting], Key | None],
    others: Callable[[Key, Tile], Iterable[Tile]],
    verify: tuple[str, str],
) -> Choice:
    """Declare a choice whose value replaces one entry of a table while it holds.

    Args:
        name: of the choice.
        about: in a few words.
        part: what is timed (see `choices.Choice`).
        gain: expected speed-up of that part.
        table: key -> tile.
        place: the entry that a run takes, or None where no kernel of the table runs in it.
        others: tiles to be tried besides the entry's own, which is the prior.
        verify: operation and backend that must agree with the reference with a tile before it is timed.
    """
    example = next(iter(table.values()))

    def candidates(setting: Setting) -> list[Value]:
        key = place(setting)
        if key is None:
            return []
        return list(dict.fromkeys(write(key, tile) for tile in (table[key], *others(key, table[key]))))

    def prior(setting: Setting) -> Value:
        key = place(setting)
        return "" if key is None else write(key, table[key])

    def shown(value: Value) -> str:
        tile: Any = read(str(value), example)[1]
        sizes = (tile.block_m, tile.block_n, *((tile.block_k,) if hasattr(tile, "block_k") else ()))
        return f"{'x'.join(map(str, sizes))} w{tile.num_warps} s{tile.num_stages}"

    def apply(value: str) -> Callable[[], None]:
        key, tile = read(value, example)
        before = table[key]
        table[key] = tile
        return lambda: table.update({key: before})

    made = Choice(name, about, part, gain, candidates, prior, show=shown, apply=apply, verify=verify)
    return choices.declare(made)
