"""What a launcher asks about the device it launches on."""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

from rcmstr_fast.kernels.architectures import family


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def on_device(device: torch.device) -> AbstractContextManager:
    """Launches inside the block go to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def architecture(device: torch.device) -> int:
    """Family of the device's tiles (see `architectures`); 80 for the interpreter."""
    if device.type != "cuda":
        return 80
    return _family(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _family(index: int) -> int:
    properties: Any = torch.cuda.get_device_properties(index)
    return family((properties.major, properties.minor), properties.shared_memory_per_block_optin)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 4 for the interpreter, so that work is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
