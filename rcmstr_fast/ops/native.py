"""The compiled extension `rcmstr_fast._C`: operations reach it through this module alone."""

from typing import Any

import torch
from torch import Tensor

try:
    from rcmstr_fast import _C as extension  # type: ignore[attr-defined]
except ImportError:
    extension = None


def has(name: str) -> bool:
    """Whether this build has the function `name`; the CUDA functions are missing where nvcc was at build time."""
    return hasattr(extension, name)


def reasons() -> list[str]:
    """Why this machine cannot run the C++ backends at all."""
    return [] if has("list_sites") else ["the extension rcmstr_fast._C is not built"]


def function(name: str, dtype: torch.dtype | None = None) -> Any:
    """A function of the extension; with `dtype` its form for rows of that dtype."""
    return getattr(extension, name if dtype is None else f"{name}_{str(dtype).removeprefix('torch.')}")


def address(tensor: Tensor | None) -> int:
    """Address of a tensor's first element, 0 for None: the extension takes memory as plain integers."""
    return 0 if tensor is None else tensor.data_ptr()
