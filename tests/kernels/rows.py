"""Inputs of the queue losses: what tests and benchmarks feed them, and errors against float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rcmstr_fast.ops import triton_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_REFUSED = triton_backend.reasons()
TRITON = pytest.mark.skipif(bool(_REFUSED), reason=f"no Triton here: {_REFUSED}")
BACKENDS = ("chunked", pytest.param("triton", marks=TRITON))


def unit_rows(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Random directions."""
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1).to(device)


def queue_rows(kind: str, query: Tensor, keys: int) -> Tensor:
    """A queue of a kind that has broken such losses: random, clustered (mean cosine 0.5), with own rows, duplicated."""
    rows = unit_rows(keys, query.shape[1], seed=7).to(query.device)
    if kind == "clustered":
        return normalize(rows + unit_rows(1, query.shape[1], seed=8).to(query.device), dim=-1)
    if kind == "own":
        return torch.cat([query, rows])[:keys]
    if kind == "duplicated":
        return rows[torch.arange(keys, device=query.device) // 3]
    return rows


def relative(result: Tensor, expected: Tensor) -> float:
    """Norm of the error over the norm of what is expected."""
    return float((result.detach().double() - expected.detach()).norm() / expected.detach().norm())


def worst_row(result: Tensor, expected: Tensor) -> float:
    """The largest error of a row over its own norm; one shorter than a tenth of the mean counts as that long."""
    norms = expected.norm(dim=1)
    return float(((result.double() - expected).norm(dim=1) / norms.clamp(min=0.1 * norms.mean())).max())
