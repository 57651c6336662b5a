"""Triton backend of the masked layers over maps in place and lists of active sites, as one custom operator.

The operator computes a convolution, a batch norm, or both. Where it does both and the batch is one statistics group,
the convolution leaves the statistics behind while it still holds its results. The map between the two and its gradient
are seen by nobody else, so their inactive sites are never filled.
"""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import triton_backend
from rcmstr_fast.ops.batch_norm.reference import group_sizes
from rcmstr_fast.ops.masked import triton_pool
from rcmstr_fast.ops.masked.layers import Layer, Pair, Window, operands, over_maps, values
from rcmstr_fast.ops.masked.lists import ListSites, WindowLists
from rcmstr_fast.ops.masked.maps import empty, nhwc, room
from rcmstr_fast.ops.masked.reference import input_map


def _size(x: Tensor) -> Pair:
    return x.shape[2], x.shape[3]


@torch.library.custom_op("rcmstr_fast::masked_conv_norm", mutates_args=())
def _conv_norm(
    x: Tensor,
    weight: Tensor | None,
    full: Tensor | None,
    affine: list[Tensor],
    residual: Tensor | None,
    active: Tensor,
    lists: list[Tensor],
    window: list[int],
    groups: list[int],
    eps: float,
    relu: bool,
    filled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The layer's result, the convolution's result where a norm follows, and mean, rstd and counts of the norm.

    Args:
        x: [B, C, h0, w0].
        weight: [O, C, kh, kw] in the dtype of x, or None without a convolution.
        full: takes the gradient of the weight; its values are not read.
        affine: weight and bias of the norm, float32; empty without a norm.
        residual: like the result, or None.
        active: [B, 1, h, w] bool.
        lists: a `WindowLists`; empty without a convolution.
        window: `Window.numbers`; any without a convolution.
        groups: images in each statistics group.
        eps: added to the variance.
        relu: apply ReLU.
        filled: results are zero at inactive sites; else they hold anything there.
    """
    from rcmstr_fast.kernels.masked.conv import masked_conv, statistics_room
    from rcmstr_fast.kernels.masked.norm import Groups, masked_norm_fwd

    y, left = nhwc(x), None
    if weight is not None:
        of = WindowLists(*lists)
        if affine and len(groups) == 1:  # rows are sorted across images: the tiles of several groups would mix
            left = (*statistics_room(x, weight, len(of.positions)), of.number)
        y = room(x, weight.shape[0], _size(active), filled and not affine)
        masked_conv(nhwc(x), weight, of[:3], y, window, partials=None if left is None else left[0])
    if not affine:
        mean, rstd, counts = (x.new_empty(0, dtype=torch.float32) for _ in range(3))
        return y, x.new_empty(0), mean, rstd, counts
    out = room(y, y.shape[1], _size(active), filled)
    residual = None if residual is None else nhwc(residual)
    over = Groups(active.contiguous(), groups, y.shape[1])
    mean, rstd, counts = masked_norm_fwd(y, (affine[0], affine[1]), residual, out, over, eps, relu, left)
    return out, x.new_empty(0) if weight is None else y, mean, rstd, counts


@_conv_norm.register_fake
def _(x, weight, full, affine, residual, active, lists, window, groups, eps, relu, filled):
    channels, number = x.shape[1] if weight is None else weight.shape[0], len(groups) if affine else 0
    out, y = (empty(x, channels, active.shape[2:]) for _ in range(2))
    statistics = [n for n in ((number, channels), (number, channels), (number,))] if affine else [(0,)] * 3
    moments = (x.new_empty(shape, dtype=torch.float32) for shape in statistics)
    return out, y if affine and weight is not None else x.new_empty(0), *moments


@torch.library.custom_op("rcmstr_fast::masked_conv_norm_bwd", mutates_args=())
def _conv_norm_bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    norm: list[Tensor],
    active: Tensor,
    lists: list[Tensor],
    window: list[int],
    groups: list[int],
    relu: bool,
    filled: bool,
    added: bool,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the weight (float32, channels_last), the norm's weight and bias, and the residual.

    `norm` holds the norm's weight, out, its input, mean, rstd and counts; empty without a norm. `wanted` asks for the
    gradient of x, `added` for that of the residual. What is not asked for or not there is empty.
    """
    from rcmstr_fast.kernels.masked.norm import Groups, masked_norm_bwd

    grad_y, (grad_x, grad_weight, grad_scale, grad_shift) = nhwc(grad), (x.new_empty(0) for _ in range(4))
    grad_residual = None
    if norm:
        scale, out, y, mean, rstd, counts = norm
        over = Groups(active.contiguous(), groups, y.shape[1])
        grad_residual = room(y, y.shape[1], _size(y), filled) if added else None
        grads = room(y, y.shape[1], _size(y), filled and weight is None), grad_residual
        grad_scale, grad_shift = masked_norm_bwd(grad_y, nhwc(y), out, scale, (mean, rstd, counts), grads, over, relu)
        grad_y = grads[0]
    residual = x.new_empty(0) if grad_residual is None else grad_residual
    if weight is None:
        return grad_y, grad_weight, grad_scale, grad_shift, residual
    grad_x, grad_weight = _conv_gradients(grad_y, x, weight, WindowLists(*lists), window, filled, wanted)
    return grad_x, grad_weight, grad_scale, grad_shift, residual


def _conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, lists: WindowLists, window: list[int], filled: bool, wanted: bool
) -> tuple[Tensor, Tensor]:
    from rcmstr_fast.kernels.masked.conv import masked_conv, masked_conv_weight

    x, grad_x = nhwc(x), x.new_empty(0)
    if wanted:
        grad_x = room(x, x.shape[1], _size(x), filled)
        masked_conv(grad, weight, lists[3:6], grad_x, window, transposed=True)
    return grad_x, masked_conv_weight(x, grad, (lists.pairs, lists.pair_counts), window)


@_conv_norm_bwd.register_fake
def _(grad, x, weight, norm, active, lists, window, groups, relu, filled, added, wanted):
    scale, shift = (torch.empty_like(norm[0]) if norm else x.new_empty(0) for _ in range(2))
    residual = empty(grad, grad.shape[1], grad.shape[2:]) if added else x.new_empty(0)
    if weight is None:
        return empty(x, x.shape[1], x.shape[2:]), x.new_empty(0), scale, shift, residual
    outputs, channels, *kernel = weight.shape
    grad_weight = weight.new_empty(outputs, *kernel, channels, dtype=torch.float32).movedim(-1, 1)
    grad_x = empty(x, channels, x.shape[2:]) if wanted else x.new_empty(0)
    return grad_x, grad_weight, scale, shift, residual


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, affine, residual, active, lists, ctx.window, ctx.groups, _, ctx.relu, ctx.filled = inputs
    out, y, *moments = output
    norm = (affine[0], out, x if weight is None else y, *moments) if affine else ()
    ctx.added, ctx.lists = residual is not None, len(lists)
    ctx.save_for_backward(x, weight, active, *lists, *norm)
    ctx.mark_non_differentiable(y, *moments)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    x, weight, active, *saved = ctx.saved_tensors
    lists, norm = saved[: ctx.lists], saved[ctx.lists :]
    wanted = ctx.needs_input_grad[0]
    grad_x, grad_weight, grad_scale, grad_shift, grad_residual = _conv_norm_bwd(
        grad, x, weight, norm, active, lists, ctx.window, ctx.groups, ctx.relu, ctx.filled, ctx.added, wanted
    )
    return (
        grad_x if wanted else None,
        None,
        None if weight is None else grad_weight,
        [grad_scale, grad_shift] if norm else [],
        grad_residual if ctx.added else None,
        None,
        [None] * len(lists),
        *[None] * 5,
    )


_conv_norm.register_autograd(_backward, setup_context=_setup)


def masked_layer(layer: Layer) -> Tensor:
    """A masked layer on maps in place."""
    x, _, window, weight, norm = over_maps(layer)
    sites = ListSites.of(layer.sites)
    filled = not sites.kept
    if window is not None and weight is None:
        return triton_pool.max_pool(x, input_map(x, sites), sites.active, window.numbers, filled)[0]
    low = full = None
    lists: list[Tensor] = []
    affine: list[Tensor] = []
    residual, eps, relu, group_size = None, 0.0, False, 0
    if window is None:
        window = Window((1, 1), (1, 1), (0, 0))  # read by nobody, but an operator's list of ints must not be empty
    elif weight is not None:
        lists = list(sites.of_window(x, window))
        x, low, full = operands(x, weight)
    if norm is not None:
        group_size = norm.group_size or 0
        affine = [norm.weight.float(), norm.bias.float()]
        residual = None if norm.residual is None else norm.residual.to(x.dtype)
        eps, relu = norm.eps, norm.relu
    groups = group_sizes(x.shape[0], group_size)
    return _conv_norm(x, low, full, affine, residual, sites.active, lists, window.numbers, groups, eps, relu, filled)[0]


def reasons(layer: Layer) -> list[str]:
    """Why the kernels cannot compute the layer."""
    x, sites, window, weight = layer.x, layer.sites, layer.window, layer.weight
    found = triton_backend.operand_reasons({"x": x, "weight": None if weight is None else values(weight)})
    if weight is not None and window is not None:
        if window.taps > 9 or max(window.kernel) > 3:
            found.append(f"kernels of up to 3x3 only, got {window.kernel[0]}x{window.kernel[1]}")
        if sites.active.numel() >= 1 << 31 or x[:, 0].numel() >= 1 << 31:
            found.append("maps must have fewer than 2^31 sites")
    elif window is not None and window.taps > 127:
        found.append(f"kernels of up to 127 taps only, got {window.kernel}")
    return found
