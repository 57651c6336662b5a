"""What a launcher asks about the device it launches on."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def on_device(device: torch.device) -> AbstractContextManager:
    """Launches inside the block go to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def architecture(device: torch.device) -> int:
    """90 from compute capability 9.0 on, else 80 (also for the interpreter)."""
    return 90 if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9 else 80


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 4 for the interpreter, so that work is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
