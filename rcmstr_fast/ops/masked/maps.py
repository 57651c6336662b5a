"""Memory for the maps that the masked kernels write; tests poison here what is not filled."""

import torch
from torch import Tensor

from rcmstr_fast.ops.masked.layers import Pair


def nhwc(x: Tensor) -> Tensor:
    """x in channels_last memory."""
    return x.contiguous(memory_format=torch.channels_last)


def empty(x: Tensor, channels: int, size: Pair) -> Tensor:
    """A map [B, channels, h, w] in channels_last memory whose inactive sites nobody reads."""
    return x.new_empty(x.shape[0], *size, channels).movedim(-1, 1)


def room(x: Tensor, channels: int, size: Pair, filled: bool) -> Tensor:
    """A map like that of `empty`, filled with zeros if asked; kernels then write its active sites."""
    return x.new_zeros(x.shape[0], *size, channels).movedim(-1, 1) if filled else empty(x, channels, size)
