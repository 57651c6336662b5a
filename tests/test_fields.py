"""Ranges of configuration fields."""

import dataclasses
import math

import pytest

from rcmstr_fast.fields import ConfigError, check_fields, number


@dataclasses.dataclass
class Inner:
    share: float = number(0.5, above=0, high=1)


@dataclasses.dataclass
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    count: int = number(1, low=0)
    weights: list[float] = number([1.0], low=0)
    rate: float | None = number(None, above=0)
    free: float = 0.0


def test_defaults_and_limits_pass():
    check_fields(Outer())
    check_fields(Outer(Inner(1.0), 0, [0.0, 2.0], 1e-9, -1e10))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"inner": Inner(0.0)}, "inner.share must be more than 0 and at most 1, got 0"),
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"count": 10**23}, "count must be at least 0 and fit 64 bits, got 1"),
        ({"count": 10**400}, "count must be at least 0 and fit 64 bits, got 1"),
        ({"weights": [1.0, math.nan]}, "weights must be at least 0, got nan"),
        ({"rate": math.inf}, "rate must be more than 0, got inf"),
        ({"free": 1e30}, "free must be finite and fit 64 bits, got 1e"),
        ({"free": -math.inf}, "free must be finite, got -inf"),
    ],
)
def test_out_of_range(change, text):
    with pytest.raises(ConfigError, match="^" + text):
        check_fields(dataclasses.replace(Outer(), **change))
