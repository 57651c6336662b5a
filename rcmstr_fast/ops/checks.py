"""Argument checks that the public operations share; every message names operation, argument, expected and got."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_KINDS = {
    "float": ("a floating-point tensor", lambda dtype: dtype.is_floating_point),
    "int64": ("an int64 tensor", lambda dtype: dtype == torch.int64),
    "bool": ("a bool tensor", lambda dtype: dtype == torch.bool),
}


def layout_text(layout: Sequence[int | str]) -> str:
    """A layout as it is written in messages and docstrings: [K, 128]."""
    return f"[{', '.join(str(size) for size in layout)}]"


def check_tensor(
    op: str, name: str, value: Any, layout: Sequence[int | str], kind: str | None = "float", like: str = ""
) -> None:
    """Check type, dtype, rank and sizes of one tensor argument.

    Args:
        op: the public operation's name.
        name: the argument's name.
        value: what the user passed.
        layout: one entry a dimension: a size that must match, or a letter for a free one.
        kind: "float", "int64", "bool" or None (any dtype).
        like: the argument the fixed sizes come from, for the message.
    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: another rank or size.
    """
    expected = layout_text(layout)
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {expected}, got {type(value).__name__}")
    if kind is not None and not _KINDS[kind][1](value.dtype):
        raise TypeError(f"{op}: {name} must be {_KINDS[kind][0]} {expected}, got {value.dtype}")
    fits = value.dim() == len(layout) and all(
        isinstance(size, str) or size == actual for size, actual in zip(layout, value.shape)
    )
    if not fits:
        like = f" like {like}" if like else ""
        raise ValueError(f"{op}: {name} must be {expected}{like}, got {layout_text(value.shape)}")


def check_not_empty(op: str, name: str, value: Tensor, letter: str) -> None:
    """Raise ValueError where the first dimension, called `letter`, has size 0."""
    if value.shape[0] == 0:
        raise ValueError(f"{op}: {name} must have {letter} >= 1 rows, got {layout_text(value.shape)}")


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors live on the device of the first."""
    given = {name: value for name, value in tensors.items() if value is not None}
    first = next(iter(given))
    for name, value in given.items():
        if value.device != given[first].device:
            raise ValueError(f"{op}: {name} must be on {given[first].device} like {first}, got {value.device}")


def check_numbers(op: str, **values: Any) -> None:
    """Raise TypeError unless every value is a number of the host."""
    for name, value in values.items():
        if not isinstance(value, Real):
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def check_whole(op: str, **values: Any) -> None:
    """Raise TypeError unless every value is a whole number of the host."""
    for name, value in values.items():
        if not isinstance(value, Integral):
            raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")


def check_positive(op: str, **values: float) -> None:
    """Raise TypeError or ValueError unless every value is a number above 0."""
    check_numbers(op, **values)
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{op}: {name} must be above 0, got {value}")


def check_divides(op: str, name: str, divisor: int, what: str, size: int) -> None:
    """Raise ValueError unless `divisor` is at least 1 and divides `size`."""
    if divisor < 1 or size % divisor:
        raise ValueError(f"{op}: {name} must divide {what} {size}, got {divisor}")


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_unit_rows(op: str, **rows: Tensor | None) -> None:
    """Debug check (synchronises): every row has length 1 to within the dtype's accuracy."""
    for name, value in rows.items():
        if value is None:
            continue
        lengths = torch.linalg.vector_norm(value.detach().float(), dim=1)
        worst = (lengths - 1).abs().max().item()
        if not worst <= (1e-4 if value.dtype.itemsize >= 4 else 1e-2):
            raise ValueError(f"{op}: {name} must have rows of length 1, got one that is off by {worst:.3g}")


def check_finite(op: str, name: str, value: Tensor) -> None:
    """Debug check (synchronises): no NaN and no infinity."""
    if not torch.isfinite(value).all().item():
        raise ValueError(f"{op}: {name} must be finite, got NaN or infinity in {layout_text(value.shape)}")


def check_queue(op: str, queue: Tensor) -> None:
    """Debug check (synchronises): neither NaN nor infinity, and no row longer than 1."""
    check_finite(op, "queue", queue)
    longest = torch.linalg.vector_norm(queue.detach().float(), dim=1).max().item()
    if longest > 1.01:
        raise ValueError(f"{op}: queue must have rows of length 1 (0 where empty), got one of length {longest:.3g}")


def check_range(op: str, name: str, value: Tensor, size: int) -> None:
    """Debug check (synchronises): every index in [0, size)."""
    if value.numel() and not (value.min().item() >= 0 and value.max().item() < size):
        raise ValueError(f"{op}: {name} must be in 0..{size - 1}, got {value.min().item()}..{value.max().item()}")
