"""One queue of earlier keys a level: a ring buffer of L2-normalised rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast import ops


class Queue(nn.Module):
    """Ring buffer `rows [K, D]` of keys, filled with normalised Gaussian rows at the start (SPEC section 3).

    Args:
        size: rows K.
        dim: row size D.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.rows: Tensor
        self.pointer: Tensor
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def enqueue(self, keys: Tensor) -> None:
        """Write keys `[n, D]` at the pointer, in place."""
        ops.enqueue_(self.rows, self.pointer, keys)

    def after(self, keys: Tensor) -> Tensor:
        """The rows `[K, D]` as they will be once `keys` are enqueued; this queue stays as it is."""
        rows, pointer = self.rows.clone(), self.pointer.clone()
        ops.enqueue_(rows, pointer, keys)
        return rows
