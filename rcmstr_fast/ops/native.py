"""The compiled extension `rcmstr_fast._C`: operations reach it through this module alone."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

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


def cuda_reasons(device: torch.device | None = None) -> list[str]:
    """Why the CUDA functions of this build cannot run on a device (None: the current one).

    An old driver, or a GPU for which this build holds no code, must be seen before the first launch: a backend that
    says so is passed over, one that fails in a launch ends the run.
    """
    if extension is None:
        return reasons()
    if not extension.cuda:
        return ["rcmstr_fast._C was built without CUDA (no nvcc at build time)"]
    if not torch.cuda.is_available():
        return ["torch finds no CUDA device"]
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    refusal = _cuda_refusal(index)
    return [f"the CUDA code of rcmstr_fast._C cannot run on this GPU: {refusal}"] if refusal else []


@functools.cache
def _cuda_refusal(index: int) -> str:
    with torch.cuda.device(index):
        return function("cuda_refusal")()


def function(name: str) -> Any:
    """A function of the extension; None where this build has none of that name."""
    return getattr(extension, name, None)


def for_dtypes(name: str, dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, Any]:
    """The forms of a function of the extension for rows of these dtypes."""
    return {dtype: function(f"{name}_{str(dtype).removeprefix('torch.')}") for dtype in dtypes}
