"""Batch norm on a CPU in C++: maps whose channels lie side by side are rows, which `ops.rows` normalises."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops.batch_norm.reference import GroupedNorm, group_rows
from rcmstr_fast.ops.rows import norm_rows
from rcmstr_fast.ops.rows import reasons as row_reasons


def grouped_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    passes: int,
    group_size: int,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> GroupedNorm:
    """The public operation in C++."""

    def as_rows(y: Tensor) -> Tensor:
        return (y.movedim(1, -1) if y.dim() == 4 else y).reshape(-1, len(weight))

    starts = list(accumulate(group_rows(x, passes, group_size) * passes, initial=0))
    added = None if residual is None else as_rows(residual)
    out, mean, var = norm_rows(as_rows(x), weight, bias, starts, eps, added, relu)
    if x.dim() != 4:
        return GroupedNorm(out.view(x.shape), mean, var)
    return GroupedNorm(out.view(x.shape[0], *x.shape[2:], len(weight)).movedim(-1, 1), mean, var)


def reasons(x: Tensor, *_: Any, **__: Any) -> list[str]:
    """Why C++ cannot run the call."""
    found = row_reasons(x)
    if torch.compiler.is_compiling():
        found.append("its C++ functions are opaque to torch.compile")
    return found + ([] if x.numel() else ["x must not be empty"])


def avoid(x: Tensor, *_: Any, **__: Any) -> list[str]:
    """Why the automatic choice passes over C++: other layouts would have to be copied first."""
    rows = x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.is_contiguous()
    return [] if rows else ["the channels of x do not lie side by side in memory"]
