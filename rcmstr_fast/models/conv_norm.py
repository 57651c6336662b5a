"""The unit of a CNN, a convolution with its batch norm, and the copies of its weight that passes share.

There is one copy of each convolution's weight in the dtype of autocast for every pass, and one sum of its gradients.

Autocast would cast a weight for the dense pass, the sparse kernels once more, and each cast would send back a gradient
of its own, rounded. Here the copies are made together once a step; in a micro-batch a weight enters the autograd graph
once, as a `CastWeight`. The dense layers give their gradient to the copy, the sparse ones theirs in float32 to the
weight, and when the last of them has come one addition makes the gradient of the weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rcmstr_fast.models.batch_norm import GroupedBatchNorm
from rcmstr_fast.ops.masked import CastWeight, Sites, masked_conv_norm

Pair = tuple[int, int]


class _Cast(torch.autograd.Function):
    """The weight and its copy as one node of the graph: two gradients come, their float32 sum leaves.

    The node is made where the weight is used first, so it runs as soon as that use has sent its gradient: no layer
    waits for those in front of it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.detach(), low.detach()

    @staticmethod
    def backward(ctx: Any, full: Tensor | None, low: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if full is None or low is None:
            return low if full is None else full, None
        return full + low, None


class _Working:
    """The copy of one weight, and its place in the graph of the present micro-batch."""

    def __init__(self, low: Tensor) -> None:
        self.low = low
        self._linked: CastWeight | None = None

    def of(self, weight: Tensor) -> CastWeight:
        """The weight with its copy, linked to the graph where a gradient is wanted."""
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return CastWeight(weight, self.low)
        if self._linked is None:
            self._linked = CastWeight(*_Cast.apply(weight, self.low))
        return self._linked


class WorkingConv2d(nn.Conv2d):
    """A convolution whose weight may be shared in the dtype of autocast (`WorkingWeights`); else `nn.Conv2d`."""

    kernel_size: Pair
    stride: Pair
    padding: Pair
    working: _Working | None = None

    def cast_weight(self) -> Tensor | CastWeight:
        """The weight as the sparse layers take it; inside torch.compile the plain one, whose cast is fused there."""
        if torch.compiler.is_compiling() or self.working is None:
            return self.weight
        kind, low = self.weight.device.type, self.working.low
        fits = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == low.dtype
        return self.working.of(self.weight) if fits else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, C, h, w]` to `[B, O, h', w']`."""
        weight = self.cast_weight()
        return self._conv_forward(x, weight.low if isinstance(weight, CastWeight) else weight, self.bias)


class ConvBN(nn.Module):
    """Convolution without bias, batch norm, optional residual, optional ReLU: the unit of the network.

    With `sites` the same weights work at the active sites only, and batch norm takes its statistics there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: Pair = (1, 1),
        padding: Pair = (1, 1),
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.conv = WorkingConv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = GroupedBatchNorm(out_channels, dims=2)
        self.relu = relu
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, sites: Sites | None = None, residual: Tensor | None = None) -> Tensor:
        """x `[B, C, h, w]` to `[B, C', h', w']`; residual `[B, C', h', w']` is added before the ReLU."""
        conv, bn = self.conv, self.bn
        if sites is not None:
            return masked_conv_norm(
                x,
                conv.cast_weight(),
                sites,
                bn.weight,
                bn.bias,
                stride=conv.stride,
                padding=conv.padding,
                eps=bn.eps,
                residual=residual,
                relu=self.relu,
                group_size=bn.group_size or None,
            )
        return bn(conv(x), residual, self.relu)

    def output_size(self, height: int, width: int) -> Pair:
        """Size of the output map for an input map of height x width."""
        return output_size((height, width), self.conv.kernel_size, self.conv.stride, self.conv.padding)


class WorkingWeights:
    """The copies of all convolutions inside a module; their memory stays, so that a step may be recorded.

    Args:
        module: on its device, in its memory format; holds `WorkingConv2d` layers.
        dtype: of autocast; None: nothing is shared.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        layers = [layer for layer in module.modules() if isinstance(layer, WorkingConv2d)]
        self._layers = [] if dtype is None else layers
        self._copies = [torch.empty_like(layer.weight, dtype=dtype) for layer in self._layers]

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast every weight; to be called once a step, after the weights have changed."""
        if self._layers:
            torch._foreach_copy_(self._copies, [layer.weight for layer in self._layers])

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Within, the layers use the copies: around forward and backward (which may recompute) of one micro-batch."""
        for layer, low in zip(self._layers, self._copies, strict=True):
            layer.working = _Working(low)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.working = None


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """Size of the output map of a window over an input map of `size`."""
    height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding, strict=True))
    return height, width
