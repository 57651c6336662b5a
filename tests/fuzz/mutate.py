"""Damage: to bytes, wherever they are, and to the values of a tree of lists and dictionaries. A function of a generator."""

import copy
import random
from typing import Any

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
#: Values that a field or a tensor's place may be given by somebody who means harm, or by accident.
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**23, -(10**23), 0.5, 1e30, float("nan"), float("inf"), float("-inf"), "", "x",
    "a\x00b", "../../../etc/passwd", "é" * 1000, b"\xff", [], [[]], [1, 1], ["x", "x"], [-1], {}, {"x": 1}, {1: 2},
)  # fmt: skip


def damaged(data: bytes, drawn: random.Random, end: int | None = None) -> bytes:
    """One to four of: bytes flipped, a number written over, a cut, zeros, a part removed, repeated or moved, more at the end.

    Args:
        data: what to damage; stays as it is.
        drawn: decides.
        end: damage falls before this byte with a probability of 3/4; None: anywhere.
    """
    made = bytearray(data)
    for _ in range(drawn.randint(1, 4)):
        limit = min(len(made), end) if end and drawn.random() < 0.75 else len(made)
        if not limit:
            break
        place = drawn.randrange(limit)
        length = min(drawn.choice((1, 2, 4, 8, 16, 64, 512, 4096)), len(made) - place)
        _KINDS[drawn.randrange(len(_KINDS))](made, place, length, drawn)
    return bytes(made)


def _flip(made: bytearray, place: int, length: int, drawn: random.Random) -> None:
    for i in range(place, place + min(length, 16)):
        made[i] ^= 1 << drawn.randrange(8)


def _number(made: bytearray, place: int, length: int, drawn: random.Random) -> None:
    size = drawn.choice((1, 2, 4, 8))
    value = drawn.choice(_NUMBERS) & (256**size - 1)
    made[place : place + size] = value.to_bytes(size, drawn.choice(("little", "big")))


def _cut(made: bytearray, place: int, length: int, drawn: random.Random) -> None:
    del made[place:]


def _zeros(made: bytearray, place: int, length: int, drawn: random.Random) -> None:
    made[place : place + length] = bytes(length)


def _remove(made: bytearray, place: int, length: int, drawn: random.Random) -> None:
    del made[place : place + length]


def _repeat(made: bytearray, place: int, length: int, drawn: random.Random) -> None:
    made[place:place] = made[place : place + length] * drawn.choice((1, 1, 2, 50))


def _move(made: bytearray, place: int, length: int, drawn: random.Random) -> None:
    other = drawn.randrange(len(made))
    made[other : other + length] = made[place : place + length]


def _append(made: bytearray, place: int, length: int, drawn: random.Random) -> None:
    made += drawn.randbytes(length)


# A cut is rarer than its share: little of the rest would be seen.
_KINDS = (_flip, _flip, _flip, _number, _number, _zeros, _remove, _repeat, _move, _append, _flip, _number, _move, _cut)


def changed(tree: Any, drawn: random.Random, hostile: tuple[Any, ...] = HOSTILE) -> Any:
    """A copy of nested dictionaries and lists in which one to three values are replaced, removed or added."""
    made = {"": copy.deepcopy(tree)}
    for _ in range(drawn.randint(1, 3)):
        places = list(_places(made))
        holder, key = drawn.choice(places)
        kind = drawn.random()
        if kind < 0.75 or holder is made:
            holder[key] = copy.deepcopy(drawn.choice(hostile))
        elif kind < 0.9:
            del holder[key]
        elif isinstance(holder, dict):
            holder[drawn.choice(("x", "", "lr", "__class__"))] = copy.deepcopy(drawn.choice(hostile))
        else:
            holder.insert(0, copy.deepcopy(drawn.choice(hostile)))
    return made[""]


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every value inside."""
    if isinstance(tree, dict):
        keys: list[Any] = list(tree)
    elif isinstance(tree, list):
        keys = list(range(len(tree)))
    else:
        return []
    return [(tree, key) for key in keys] + [place for key in keys for place in _places(tree[key])]
