"""Convolution and pooling at the active sites only, in plain PyTorch (dense work, masked before and after)."""

import torch.nn.functional as F
from torch import Tensor

from rcmstr_fast.ops.reference.cast_weight import CastWeight, values
from rcmstr_fast.ops.reference.masked_norm import masked_batch_norm
from rcmstr_fast.ops.reference.sites import Sites, keep


def input_map(x: Tensor, sites: Sites) -> Tensor:
    """The map of the input: that of the stage, or of the stage before it where the sizes differ."""
    if sites.source is None or x.shape[2:] == sites.active.shape[2:]:
        return sites.active
    return sites.source


def masked_conv2d(
    x: Tensor,
    weight: Tensor | CastWeight,
    sites: Sites,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.masked_conv2d`."""
    x = keep(x, input_map(x, sites))
    return keep(F.conv2d(x, values(weight), stride=stride, padding=padding), sites.active)


def masked_conv_norm(
    x: Tensor,
    weight: Tensor | CastWeight,
    sites: Sites,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
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
    x: Tensor,
    sites: Sites,
    *,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.masked_max_pool2d`."""
    active = input_map(x, sites)
    seen = F.max_pool2d(active.to(x.dtype), kernel_size, stride, padding) > 0
    pooled = F.max_pool2d(keep(x, active, float("-inf")), kernel_size, stride, padding)
    return keep(pooled, seen & sites.active)
