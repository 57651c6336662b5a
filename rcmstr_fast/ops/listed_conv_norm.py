"""`masked_conv_norm` as Triton kernels: the convolution leaves the statistics, one pass does the rest of the norm.

The result of the convolution and its gradient live between the two layers only, so their inactive sites hold anything.
"""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import listed, triton_backend
from rcmstr_fast.ops.dispatch import Operation, register
from rcmstr_fast.ops.listed import nhwc
from rcmstr_fast.ops.reference import CastWeight, Sites
from rcmstr_fast.ops.reference.cast_weight import operands
from rcmstr_fast.ops.reference.masked_norm import group_sizes


@torch.library.custom_op("rcmstr_fast::masked_conv_norm", mutates_args=())
def _conv_norm(
    x: Tensor, weight: Tensor, full: Tensor, scale: Tensor, shift: Tensor, active: Tensor, residual: Tensor | None,
    lists: list[Tensor], stride: list[int], padding: list[int], eps: float, relu: bool, filled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from rcmstr_fast.kernels.masked_conv import masked_conv, stats_room
    from rcmstr_fast.kernels.masked_norm import masked_norm_fwd

    size, rows = (active.shape[2], active.shape[3]), (lists[0], lists[1], lists[2])
    y, out = listed.empty(x, weight.shape[0], size), listed.room(x, weight.shape[0], size, filled)
    partials, tile_rows = stats_room(x, weight, len(lists[0]))
    masked_conv(nhwc(x), weight, rows, y, (stride[0], stride[1]), (padding[0], padding[1]), False, partials)
    residual = None if residual is None else nhwc(residual)
    left = (partials, tile_rows, lists[2])
    moments = masked_norm_fwd(y, scale, shift, active.contiguous(), residual, out, [x.shape[0]], eps, relu, left)
    return out, y, *moments


@_conv_norm.register_fake
def _(x, weight, full, scale, shift, active, residual, lists, stride, padding, eps, relu, filled):  # type: ignore[no-untyped-def]
    out, y = (listed.empty(x, weight.shape[0], active.shape[2:]) for _ in range(2))
    mean, rstd = (scale.new_empty(1, weight.shape[0]) for _ in range(2))
    return out, y, mean, rstd, scale.new_empty(1)


@torch.library.custom_op("rcmstr_fast::masked_conv_norm_bwd", mutates_args=())
def _conv_norm_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, active: Tensor, out: Tensor, y: Tensor,
    moments: list[Tensor], lists: list[Tensor], stride: list[int], padding: list[int], relu: bool, filled: bool,
    added: bool, wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from rcmstr_fast.kernels.masked_norm import masked_norm_bwd

    size = (y.shape[2], y.shape[3])
    grad_y = listed.empty(y, y.shape[1], size)
    grad_residual = listed.room(y, y.shape[1], size, filled) if added else None
    mean, rstd, counts = moments
    grad_scale, grad_shift = masked_norm_bwd(
        nhwc(grad), y, out, scale, active.contiguous(), mean, rstd, counts, grad_y, grad_residual, [x.shape[0]], relu
    )
    grad_x, grad_weight = listed.conv_gradients(grad_y, x, weight, lists, stride, padding, filled, wanted)
    return grad_x, grad_weight, grad_scale, grad_shift, x.new_empty(0) if grad_residual is None else grad_residual


@_conv_norm_bwd.register_fake
def _(grad, x, weight, scale, active, out, y, moments, lists, stride, padding, relu, filled, added, wanted):  # type: ignore[no-untyped-def]
    grad_residual = listed.empty(y, y.shape[1], y.shape[2:]) if added else x.new_empty(0)
    grads = torch.empty_like(scale), torch.empty_like(scale)
    return *listed.no_conv_gradients(x, weight, wanted), *grads, grad_residual


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, scale, _, active, residual, lists, ctx.stride, ctx.padding, _, ctx.relu, ctx.filled = inputs
    ctx.added, ctx.lists = residual is not None, len(lists)
    ctx.save_for_backward(*lists, x, weight, scale, active, *output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    lists = list(ctx.saved_tensors[: ctx.lists])
    x, weight, scale, active, out, y, *moments = ctx.saved_tensors[ctx.lists :]
    wanted = ctx.needs_input_grad[0]
    grad_x, grad_weight, grad_scale, grad_shift, grad_residual = _conv_norm_bwd(
        grad, x, weight, scale, active, out, y, moments, lists, ctx.stride, ctx.padding, ctx.relu, ctx.filled,
        ctx.added, wanted,
    )  # fmt: skip
    return (
        grad_x if wanted else None, None, grad_weight, grad_scale, grad_shift, None,
        grad_residual if ctx.added else None, [None] * len(lists), None, None, None, None, None,
    )  # fmt: skip


_conv_norm.register_autograd(_backward, setup_context=_setup)


def _masked_conv_norm(
    x: Tensor, weight: Tensor | CastWeight, sites: Sites, norm_weight: Tensor, norm_bias: Tensor, *, stride: Any,
    padding: Any, eps: float, residual: Tensor | None, relu: bool, group_size: int | None,
) -> Tensor:  # fmt: skip
    """Fused where the batch is one statistics group; rows are sorted across images, so groups are not runs of tiles."""
    if len(group_sizes(x.shape[0], group_size or 0)) > 1:
        y = listed.masked_conv2d(x, weight, sites, stride=stride, padding=padding)
        return listed.masked_batch_norm(
            y, norm_weight, norm_bias, sites, eps=eps, residual=residual, relu=relu, group_size=group_size
        )
    window, lists = listed.listed_window(x, weight, sites, stride, padding)
    x, low, full = operands(x, weight)
    residual = None if residual is None else residual.to(x.dtype)
    return _conv_norm(
        x, low, full, norm_weight.float(), norm_bias.float(), sites.active, residual, lists, list(window.stride),
        list(window.padding), eps, relu, listed.fills(sites),
    )[0]  # fmt: skip


def register_listed_conv_norm(op: Operation) -> None:
    """Register the Triton backend of `masked_conv_norm`."""
    register(
        op,
        "triton",
        _masked_conv_norm,
        unsupported_reasons=listed.conv_reasons,
        available=triton_backend.reasons,
        avoid=listed.avoid,
    )
