"""Max pooling over active sites as a Triton kernel, as a custom operator."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops.masked.maps import empty, nhwc, room


@torch.library.custom_op("rcmstr_fast::masked_max_pool2d", mutates_args=())
def max_pool(x: Tensor, source: Tensor, active: Tensor, window: list[int], filled: bool) -> tuple[Tensor, Tensor]:
    """The largest active input of each window [B, C, h, w], and the tap where it stood (int8).

    Args:
        x: [B, C, h0, w0].
        source: [B, 1, h0, w0] bool; active inputs.
        active: [B, 1, h, w] bool; active outputs.
        window: `Window.numbers`.
        filled: the result is zero at inactive sites, and so is the gradient; else they hold anything there.
    """
    from rcmstr_fast.kernels.masked.pool import masked_pool_fwd

    out = room(x, x.shape[1], (active.shape[2], active.shape[3]), filled)
    which = torch.empty_like(out, dtype=torch.int8)
    masked_pool_fwd(nhwc(x), source.contiguous(), active.contiguous(), out, which, window)
    return out, which


@max_pool.register_fake
def _(x, source, active, window, filled):
    out = empty(x, x.shape[1], active.shape[2:])
    return out, torch.empty_like(out, dtype=torch.int8)


@torch.library.custom_op("rcmstr_fast::masked_max_pool2d_bwd", mutates_args=())
def _pool_bwd(grad: Tensor, which: Tensor, source: Tensor, active: Tensor, window: list[int], filled: bool) -> Tensor:
    from rcmstr_fast.kernels.masked.pool import masked_pool_bwd

    grad_x = room(grad, grad.shape[1], (source.shape[2], source.shape[3]), filled)
    masked_pool_bwd(nhwc(grad), which, source.contiguous(), active.contiguous(), grad_x, window)
    return grad_x


@_pool_bwd.register_fake
def _(grad, which, source, active, window, filled):
    return empty(grad, grad.shape[1], source.shape[2:])


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, source, active, ctx.window, ctx.filled = inputs
    ctx.save_for_backward(output[1], source, active)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    return _pool_bwd(grad, *ctx.saved_tensors, ctx.window, ctx.filled), None, None, None, None


max_pool.register_autograd(_backward, setup_context=_setup)
