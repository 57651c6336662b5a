"""The backends a test body runs on, and the comparisons the tests share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rcmstr_fast.ops import dispatch

#: Largest error relative to the largest expected magnitude, by dtype of the arguments.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Case:
    """One usable backend on one device."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, device

    def width(self, width: int) -> int:
        """The D to test queue losses at: the fused kernels have only some."""
        return 64 if self.backend in ("triton", "cuda") else width

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype whose tolerance queue losses must meet: the fused kernels take float16 operands."""
        return torch.float16 if self.backend in ("triton", "cuda") else dtype

    def __repr__(self) -> str:
        return f"{self.backend}-{self.device}"

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a public operation on this backend; skip where it refuses float64."""
        try:
            return function(*args, backend=self.backend, **kwargs)
        except dispatch.BackendError as error:
            if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args):
                pytest.skip(str(error))
            raise


def cases(*operations: str) -> pytest.MarkDecorator:
    """Parametrise `case` over the backends of `operations` that this machine can run; without one: the reference."""
    listed = [dispatch.availability()[name] for name in operations] or [{"reference": []}]
    usable = [b for b in listed[0] if all(found.get(b, ["missing"]) == [] for found in listed)]
    gpu = torch.cuda.is_available()
    devices = {
        "reference": ["cpu", "cuda"] if gpu else ["cpu"],
        "chunked": ["cpu", "cuda"] if gpu else ["cpu"],
        "cpp": ["cpu"],
        "triton": ["cuda" if gpu else "cpu"],
        "cuda": ["cuda"],
    }
    pairs = [Case(backend, device) for backend in usable for device in devices[backend]]
    return pytest.mark.parametrize("case", pairs, ids=repr)


def unit_rows(count: int, width: int, seed: int, **kwargs: Any) -> Tensor:
    """Random rows of length 1, drawn in float64 on the CPU and then cast."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1).to(**kwargs)


def normal(*shape: int, seed: int, **kwargs: Any) -> Tensor:
    """Standard normal numbers, drawn in float64 on the CPU and then cast."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**kwargs)


def array(tensor: Tensor) -> np.ndarray:
    """float64 (or bool, int64) NumPy copy of a tensor."""
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def assert_near(actual: Tensor, expected: np.ndarray | Tensor | float, dtype: torch.dtype, what: str = "") -> None:
    """Compare with the tolerance of `dtype`, relative to the largest expected magnitude (at least 1)."""
    want = array(expected) if isinstance(expected, Tensor) else np.asarray(expected)
    got = array(actual)
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    error = np.abs(got - want).max(initial=0.0)
    scale = max(1.0, np.abs(want).max(initial=0.0))
    assert error <= TOLERANCE[dtype] * scale, f"{what}: error {error:.3g} at scale {scale:.3g}"
