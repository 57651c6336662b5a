"""Batch normalisation over groups of images, in plain PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GroupedNorm(NamedTuple):
    """Normalised values `out`; `mean` and unbiased variance `var` of each group [groups, C]."""

    out: Tensor
    mean: Tensor
    var: Tensor


def group_sizes(batch: int, group_size: int) -> list[int]:
    """Images in each statistics group: full groups, then the rest; a rest of one image joins the group before."""
    if group_size <= 0 or group_size >= batch:
        return [batch]
    sizes = [group_size] * (batch // group_size)
    rest = batch % group_size
    if rest == 1:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def group_rows(x: Tensor, passes: int, group_size: int) -> list[int]:
    """Rows (sites) in each statistics group of one pass; see `grouped_batch_norm` for the shapes of x."""
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    sites = x[0].numel() // channels
    return [images * sites for images in group_sizes(x.shape[0] // passes, group_size)]


def grouped_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    passes: int = 1,
    group_size: int = 0,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
) -> GroupedNorm:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.grouped_batch_norm`."""
    sizes = group_sizes(x.shape[0] // passes, group_size) * passes
    rows = x if x.dim() == 4 else x.flatten(0, -2)
    sites = len(rows) // max(1, len(x))
    # With momentum 1 each group leaves exactly its own mean and unbiased variance in a fresh buffer.
    stats = weight.new_zeros(2, len(sizes), len(weight))
    parts = [
        F.batch_norm(part, stats[0, i], stats[1, i], weight, bias, True, 1.0, eps)
        for i, part in enumerate(rows.split([sites * size for size in sizes]))
    ]
    out = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)
    out = out if residual is None else out + residual
    return GroupedNorm(F.relu(out) if relu else out, *stats)
