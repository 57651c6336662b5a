"""Fields of configuration dataclasses that know their range; stdlib only.

A number is declared with `number(default, low=..)` beside its type, and `check_fields` looks at every field of a
configuration, nested ones included, before anything is created. NaN and infinity are never in a range.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

#: Largest whole number that any field takes: what fits 64 bits with a sign.
LARGEST = 2**63 - 1


class ConfigError(ValueError):
    """A wrong value of the user's; shown as one line, exit status 2."""


@dataclass(frozen=True)
class Bounds:
    """The numbers a field takes.

    Attributes:
        low: smallest value; None: none.
        high: largest value; None: none.
        above: values must be larger than this; None: no such limit.
        below: values must be smaller than this; None: no such limit.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether `value` lies inside."""
        return (
            abs(value) <= LARGEST  # never so for NaN and infinity
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        limits = [("at least", self.low), ("more than", self.above), ("at most", self.high), ("less than", self.below)]
        return " and ".join(f"{words} {limit:g}" for words, limit in limits if limit is not None) or "finite"


def number(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field of a number, or of a list of numbers, with its range.

    Args:
        default: None where the field may be null; a list is copied for each instance.
        low: smallest value.
        high: largest value.
        above: values must be larger.
        below: values must be smaller.
    """
    metadata = {"bounds": Bounds(low, high, above, below)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(config: Any, prefix: str = "") -> None:
    """Check every number of a configuration dataclass and of those inside it.

    Args:
        config: an instance.
        prefix: what stands before the names of its fields in messages: `train.`.
    Raises:
        ConfigError: naming the first field that is out of range, what was expected and what came.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{prefix}{field.name}.")
        else:
            check_value(prefix + field.name, value, field.metadata.get("bounds"))


def check_value(name: str, value: Any, bounds: Bounds | None = None) -> None:
    """Check a number, or each number of a list; anything else passes.

    Args:
        name: for the message.
        value: of the field.
        bounds: None: any number that is finite and fits 64 bits.
    Raises:
        ConfigError: as `check_fields`.
    """
    bounds = bounds or Bounds()
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, (int, float)) and not isinstance(item, bool) and not bounds.holds(item):
            long = " and fit 64 bits" if LARGEST < abs(item) < math.inf else ""
            raise ConfigError(f"{name} must be {bounds}{long}, got {item}")
