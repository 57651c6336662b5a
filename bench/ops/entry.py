"""An operation at one shape with everybody who can do it, and the check that comes before any timing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: Called with `gradient`; returns the results, then with `gradient` the gradients.
Provider = Callable[[bool], list[Tensor]]
#: Largest relative error (norm over norm against float64) of results, the numbers, and of gradients and maps.
VALUE, GRADIENT = 1e-3, 1e-2
FORWARD, BOTH = "forward", "forward and backward"
#: Marks a provider that computes something else of the same cost, which no check can compare.
UNCHECKED = "unchecked"


class Disagreement(Exception):
    """A provider's results are off; `errors` holds the relative error of each."""

    def __init__(self, errors: list[float]) -> None:
        super().__init__(f"its results are off: relative errors {', '.join(f'{e:.3g}' for e in errors)}")
        self.errors = errors


@dataclass
class Entry:
    """One operation at one shape.

    Attributes:
        operation: name of the operation.
        shape: name of the shape with its sizes.
        expected: float64 results, as a provider returns them with gradient.
        providers: name -> provider.
        flops: multiply-adds x 2 of the fp16 tensor work of the two-pass design, forward with gradient.
        limit: largest relative error of every result; None: VALUE for numbers and GRADIENT for the others.
        about: further facts for the rows.
    """

    operation: str
    shape: str
    expected: Callable[[], list[Tensor]]
    providers: dict[str, Provider] = field(default_factory=dict)
    flops: float = 0.0
    limit: float | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def head(self, provider: str) -> dict[str, Any]:
        """The names of a provider's rows."""
        return {"group": "ops", "operation": self.operation, "shape": self.shape, "provider": provider, **self.about}

    def check(self, provider: str, expected: list[Tensor]) -> list[float]:
        """Compare a provider with `expected`, what `expected()` returned; the relative error of each result.

        Raises:
            LookupError: this machine has no such provider.
            Disagreement: one of them is too large.
        """
        if provider not in self.providers:
            raise LookupError("not installed here")
        if UNCHECKED in provider:
            return []
        found = self.providers[provider](True)
        errors = [relative_error(f, e) for f, e in zip(found, expected, strict=True)]
        limits = [self.limit or (VALUE if e.dim() == 0 else GRADIENT) for e in expected]
        if not all(error <= limit for error, limit in zip(errors, limits)):
            raise Disagreement(errors)
        return errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found.detach().double() - expected).norm() / expected.norm().clamp(min=1e-12))
