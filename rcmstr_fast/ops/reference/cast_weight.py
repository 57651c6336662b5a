"""A convolution's weight that has been cast once for every layer that uses it."""

from typing import NamedTuple

import torch
from torch import Tensor


class CastWeight(NamedTuple):
    """A weight and its one copy in the dtype of autocast; the masked convolutions take it instead of a weight.

    Attributes:
        full: [O, C, kh, kw] float32; takes the gradients that are summed in float32.
        low: the same values in the dtype of autocast; takes the gradients of the layers that know only this dtype.
    """

    full: Tensor
    low: Tensor


def values(weight: Tensor | CastWeight) -> Tensor:
    """The tensor whose shape and device are those of the weight, and which any layer can multiply with."""
    return weight.low if isinstance(weight, CastWeight) else weight


def operands(x: Tensor, weight: Tensor | CastWeight) -> tuple[Tensor, Tensor, Tensor]:
    """What a convolution with a gradient of its own works on (autocast applies as in `conv2d`).

    Returns:
        x and the weight's values without gradient, in the dtype to compute in, and the tensor that takes the weight's
        gradient.
    """
    kind = x.device.type
    full, low = weight if isinstance(weight, CastWeight) else (weight, weight)
    low = low.detach()
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, low = x.to(dtype), low.to(dtype)
    return x, low, full
