"""The masked layers in plain PyTorch: dense work, masked before and after."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import pad

from rcmstr_fast.ops.batch_norm.reference import group_sizes
from rcmstr_fast.ops.masked.layers import CastWeight, OneOrPair, Sites, values


def keep(x: Tensor, active: Tensor, fill: float = 0.0) -> Tensor:
    """x at the active sites and `fill` elsewhere; passes neither NaN nor gradient, keeps the memory format."""
    return torch.where(active, x, fill)  # masked_fill would turn channels_last into contiguous


def input_map(x: Tensor, sites: Sites) -> Tensor:
    """The map of the input: that of the stage, or of the stage before it where the sizes differ."""
    if sites.source is None or x.shape[2:] == sites.active.shape[2:]:
        return sites.active
    return sites.source


def masked_conv2d(
    x: Tensor, weight: Tensor | CastWeight, sites: Sites, *, stride: OneOrPair = 1, padding: OneOrPair = 0
) -> Tensor:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.masked_conv2d`."""
    x = keep(x, input_map(x, sites))
    return keep(F.conv2d(x, values(weight), stride=stride, padding=padding), sites.active)


def standardise(x: Tensor, active: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) with statistics over the active sites of [b, C, h, w]; 0 elsewhere."""
    count = active.sum().clamp(min=1)
    mean = keep(x, active).sum(dim=(0, 2, 3), keepdim=True) / count
    centred = keep(x - mean, active)
    var = centred.square().sum(dim=(0, 2, 3), keepdim=True) / count
    return centred * torch.rsqrt(var + eps)


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


def masked_conv_norm(
    x: Tensor,
    weight: Tensor | CastWeight,
    sites: Sites,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: OneOrPair = 1,
    padding: OneOrPair = 0,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    group_size: int | None = None,
) -> Tensor:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.masked_conv_norm`."""
    y = masked_conv2d(x, weight, sites, stride=stride, padding=padding)
    return masked_batch_norm(
        y, norm_weight, norm_bias, sites, eps=eps, residual=residual, relu=relu, group_size=group_size
    )


def masked_max_pool2d(
    x: Tensor, sites: Sites, *, kernel_size: OneOrPair, stride: OneOrPair, padding: OneOrPair = 0
) -> Tensor:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.masked_max_pool2d`."""
    active = input_map(x, sites)
    seen = F.max_pool2d(active.to(x.dtype), kernel_size, stride, padding) > 0
    pooled = F.max_pool2d(keep(x, active, float("-inf")), kernel_size, stride, padding)
    return keep(pooled, seen & sites.active)


def carry(active: Tensor, dim: int, size: int, rule: str) -> Tensor:
    """Carry a map over one axis to `size` sites; see the table in `rcmstr_fast.ops.active_sites`."""
    before = active.shape[dim]
    if size == before + 1:  # k2 s1 p1: site j sees j - 1 and j
        if rule == "anchored":
            return torch.cat([active, active.narrow(dim, before - 1, 1)], dim=dim)
        padding = (1, 1) if dim == 3 else (0, 0, 1, 1)
        active, before = pad(active, padding), before + 2
    if size == before - 1:  # k2 s1 p0: site j sees j and j + 1
        first = active.narrow(dim, 0, size)
        return first if rule == "anchored" else first | active.narrow(dim, 1, size)
    return active.unflatten(dim, (size, before // size)).any(dim=dim + 1)  # windows side by side


def active_sites(mask: Tensor, stages: Sequence[tuple[int, int]], rule: str = "anchored") -> list[Sites]:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.active_sites`."""
    visible = ~mask[:, None]
    rows, columns = mask.shape[1:]
    sites: list[Sites] = []
    for height, width in stages:
        source = sites[-1].active if sites else None
        if height % rows == 0 and width % columns == 0:
            active = visible.repeat_interleave(height // rows, dim=2).repeat_interleave(width // columns, dim=3)
        else:
            active = carry(carry(visible if source is None else source, 2, height, "any"), 3, width, rule)
        sites.append(Sites(active, source))
    return sites
