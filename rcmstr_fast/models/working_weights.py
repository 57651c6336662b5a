"""One copy of each convolution's weight in the dtype of autocast for every pass, and one sum of its gradients.

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

from rcmstr_fast.ops import CastWeight


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
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return CastWeight(weight, self.low)
        if self._linked is None:
            self._linked = CastWeight(*_Cast.apply(weight, self.low))
        return self._linked


class WorkingConv2d(nn.Conv2d):
    """A convolution whose weight may be shared in the dtype of autocast (`WorkingWeights`); else `nn.Conv2d`."""

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
