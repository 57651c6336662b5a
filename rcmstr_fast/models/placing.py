"""Where a network computes: device, dtype and memory format."""

from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def placed(module: M, device: torch.device, dtype: torch.dtype | None = None) -> M:
    """Move a module to a device (and dtype) with its convolutions in channels_last memory; the module itself."""
    move: Any = module.to  # the stubs know memory_format of tensors alone
    return move(device=device, dtype=dtype, memory_format=torch.channels_last)
