"""Carrying a mask through the stages of a CNN in plain PyTorch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Sites(NamedTuple):
    """Active sites `active` [B, 1, h, w] bool of one stage; `source` [B, 1, h0, w0] those of the stage before it."""

    active: Tensor
    source: Tensor | None


def keep(x: Tensor, active: Tensor, fill: float = 0.0) -> Tensor:
    """x at the active sites and `fill` elsewhere; passes neither NaN nor gradient, keeps the memory format."""
    return torch.where(active, x, fill)  # masked_fill would turn channels_last into contiguous


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
