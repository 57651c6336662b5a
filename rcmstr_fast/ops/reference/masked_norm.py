"""Batch normalisation over the active sites only, in plain PyTorch."""

import torch
from torch import Tensor

from rcmstr_fast.ops.reference.sites import Sites, keep


def standardise(x: Tensor, active: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) with statistics over the active sites of [b, C, h, w]; 0 elsewhere."""
    count = active.sum().clamp(min=1)
    mean = keep(x, active).sum(dim=(0, 2, 3), keepdim=True) / count
    centred = keep(x - mean, active)
    var = centred.square().sum(dim=(0, 2, 3), keepdim=True) / count
    return centred * torch.rsqrt(var + eps)


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


def masked_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    sites: Sites,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    group_size: int | None = None,
) -> Tensor:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.masked_batch_norm`."""
    sizes = group_sizes(x.shape[0], group_size or 0)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    groups = zip(wide.split(sizes), sites.active.split(sizes))
    out = torch.cat([standardise(part, active, eps) for part, active in groups])
    out = out * weight[:, None, None] + bias[:, None, None]
    if residual is not None:
        out = out + residual
    out = keep(out, sites.active)
    return (out.relu() if relu else out).to(x.dtype)
