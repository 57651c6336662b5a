"""Where a network computes: device, dtype and memory format."""

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def placed(module: M, device: torch.device, dtype: torch.dtype | None = None) -> M:
    """Move a module to a device (and dtype) with its convolutions in channels_last memory; the module itself."""
    return module.to(device=device, dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
