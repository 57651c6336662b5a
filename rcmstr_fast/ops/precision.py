"""The precision in which losses and probabilities are taken."""

from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x.float() if x.element_size() < 4 else x
