"""When a Triton kernel may run, answered without importing triton."""

import os
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.kernels.architectures import refusal

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """True where Triton's own TRITON_INTERPRET=1 runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reasons() -> list[str]:
    """Why this machine cannot run Triton kernels at all."""
    if find_spec("triton") is None:
        return ["triton is not installed"]
    if interpreted():
        return _interpreter_reasons()
    if not torch.cuda.is_available():
        return ["there is no CUDA GPU (TRITON_INTERPRET=1 runs kernels on CPU tensors, slowly)"]
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = refusal((properties.major, properties.minor), properties.shared_memory_per_block_optin)
    return [found] if found else []


def _interpreter_reasons() -> list[str]:
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    broken = triton < (3, 7) and numpy >= (2, 4)
    return ["the interpreter of triton before 3.7 needs numpy below 2.4"] if broken else []


def operand_reasons(operands: dict[str, Tensor | None]) -> list[str]:
    """Why these tensors cannot be operands of a kernel: device or dtype."""
    device = "cpu" if interpreted() else "cuda"
    found = []
    for name, tensor in operands.items():
        if tensor is None:
            continue
        if tensor.device.type != device:
            found.append(f"{name} must be on {device}, got {tensor.device}")
        if tensor.dtype not in DTYPES:
            found.append(f"{name} must be one of {', '.join(map(str, DTYPES))}, got {tensor.dtype}")
    return found


def avoid_on_cpu(*arguments: Any, **options: Any) -> list[str]:
    """Why the automatic choice passes over the kernels: the interpreter is slow, so only an order runs it."""
    return ["the interpreter runs only on order"] if interpreted() else []
