"""Exponential moving average of parameters in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def momentum_update_(target: Sequence[Tensor], source: Sequence[Tensor], m: float) -> None:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.momentum_update_`."""
    if target:  # lerp keeps target == source exactly, which m * target + (1 - m) * source would not
        torch._foreach_lerp_(list(target), list(source), 1 - m)
