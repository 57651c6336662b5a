"""The masked layers as Triton kernels over dense channels_last maps and lists of active sites, as custom operators."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import triton_backend
from rcmstr_fast.ops.dispatch import Operation, register
from rcmstr_fast.ops.reference import CastWeight, Sites
from rcmstr_fast.ops.reference.cast_weight import operands, values
from rcmstr_fast.ops.reference.masked_conv import input_map
from rcmstr_fast.ops.reference.masked_norm import group_sizes
from rcmstr_fast.ops.site_lists import ListedSites, window_lists
from rcmstr_fast.ops.site_rows import Pair, Window


def nhwc(x: Tensor) -> Tensor:
    """x in channels_last memory."""
    return x.contiguous(memory_format=torch.channels_last)


def empty(x: Tensor, channels: int, size: Pair) -> Tensor:
    """A map [B, channels, h, w] in channels_last memory whose inactive sites nobody reads."""
    return x.new_empty(x.shape[0], *size, channels).movedim(-1, 1)


def room(x: Tensor, channels: int, size: Pair, filled: bool) -> Tensor:
    """A map like that of `empty`, filled with zeros if asked; kernels then write its active sites."""
    return x.new_zeros(x.shape[0], *size, channels).movedim(-1, 1) if filled else empty(x, channels, size)


def fills(sites: Sites) -> bool:
    """Whether results of layers over these sites are zero at inactive sites."""
    return not isinstance(sites, ListedSites)


@torch.library.custom_op("rcmstr_fast::masked_conv2d", mutates_args=())
def _conv(
    x: Tensor, weight: Tensor, full: Tensor, lists: list[Tensor], size: list[int], stride: list[int],
    padding: list[int], filled: bool,
) -> Tensor:  # fmt: skip
    from rcmstr_fast.kernels.masked_conv import masked_conv

    out = room(x, weight.shape[0], (size[0], size[1]), filled)
    rows = (lists[0], lists[1], lists[2])
    return masked_conv(nhwc(x), weight, rows, out, (stride[0], stride[1]), (padding[0], padding[1]), False)


@_conv.register_fake
def _(x, weight, full, lists, size, stride, padding, filled):  # type: ignore[no-untyped-def]
    return empty(x, weight.shape[0], size)


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, lists: list[Tensor], stride: list[int], padding: list[int], filled: bool,
    wanted: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x (empty unless wanted) and of the weight (float32, channels_last)."""
    from rcmstr_fast.kernels.masked_conv import masked_conv, masked_conv_weight

    x, steps, pads = nhwc(x), (stride[0], stride[1]), (padding[0], padding[1])
    grad_x = x.new_empty(0)
    if wanted:
        grad_x = room(x, x.shape[1], (x.shape[2], x.shape[3]), filled)
        masked_conv(grad, weight, (lists[3], lists[4], lists[5]), grad_x, steps, pads, True)
    kernel = (weight.shape[2], weight.shape[3])
    return grad_x, masked_conv_weight(x, grad, kernel, lists[6], lists[7], steps, pads)


def no_conv_gradients(x: Tensor, weight: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """What `conv_gradients` returns, without values."""
    outputs, channels, *kernel = weight.shape
    grad_weight = weight.new_empty(outputs, *kernel, channels, dtype=torch.float32).movedim(-1, 1)
    return empty(x, channels, (x.shape[2], x.shape[3])) if wanted else x.new_empty(0), grad_weight


@torch.library.custom_op("rcmstr_fast::masked_conv2d_bwd", mutates_args=())
def _conv_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, lists: list[Tensor], stride: list[int], padding: list[int], filled: bool,
    wanted: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return conv_gradients(nhwc(grad), x, weight, lists, stride, padding, filled, wanted)


@_conv_bwd.register_fake
def _(grad, x, weight, lists, stride, padding, filled, wanted):  # type: ignore[no-untyped-def]
    return no_conv_gradients(x, weight, wanted)


def _conv_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, lists, _, ctx.stride, ctx.padding, ctx.filled = inputs
    ctx.save_for_backward(x, weight, *lists)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, *lists = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    grad_x, grad_weight = _conv_bwd(grad, x, weight, lists, ctx.stride, ctx.padding, ctx.filled, wanted)
    return grad_x if wanted else None, None, grad_weight, [None] * len(lists), None, None, None, None


_conv.register_autograd(_conv_backward, setup_context=_conv_setup)


@torch.library.custom_op("rcmstr_fast::masked_batch_norm", mutates_args=())
def _norm(
    x: Tensor, weight: Tensor, bias: Tensor, active: Tensor, residual: Tensor | None, groups: list[int], eps: float,
    relu: bool, filled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from rcmstr_fast.kernels.masked_norm import masked_norm_fwd

    out = room(x, x.shape[1], (x.shape[2], x.shape[3]), filled)
    residual = None if residual is None else nhwc(residual)
    moments = masked_norm_fwd(nhwc(x), weight, bias, active.contiguous(), residual, out, groups, eps, relu)
    return out, *moments


@_norm.register_fake
def _(x, weight, bias, active, residual, groups, eps, relu, filled):  # type: ignore[no-untyped-def]
    out = empty(x, x.shape[1], x.shape[2:])
    mean, rstd = (weight.new_empty(len(groups), x.shape[1]) for _ in range(2))
    return out, mean, rstd, weight.new_empty(len(groups))


@torch.library.custom_op("rcmstr_fast::masked_batch_norm_bwd", mutates_args=())
def _norm_bwd(
    grad: Tensor, x: Tensor, out: Tensor, weight: Tensor, active: Tensor, moments: list[Tensor], groups: list[int],
    relu: bool, filled: bool, added: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from rcmstr_fast.kernels.masked_norm import masked_norm_bwd

    x, size = nhwc(x), (x.shape[2], x.shape[3])
    grad_x = room(x, x.shape[1], size, filled)
    grad_residual = room(x, x.shape[1], size, filled) if added else None
    mean, rstd, counts = moments
    grad_weight, grad_bias = masked_norm_bwd(
        nhwc(grad), x, out, weight, active.contiguous(), mean, rstd, counts, grad_x, grad_residual, groups, relu
    )
    residual = x.new_empty(0) if grad_residual is None else grad_residual
    return grad_x, residual, grad_weight, grad_bias


@_norm_bwd.register_fake
def _(grad, x, out, weight, active, moments, groups, relu, filled, added):  # type: ignore[no-untyped-def]
    grad_x, grad_residual = (empty(x, x.shape[1], x.shape[2:]) for _ in range(2))
    grads = torch.empty_like(weight), torch.empty_like(weight)
    return grad_x, grad_residual if added else x.new_empty(0), *grads


def _norm_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, active, residual, ctx.groups, _, ctx.relu, ctx.filled = inputs
    ctx.added = residual is not None
    ctx.save_for_backward(x, weight, active, *output)
    ctx.mark_non_differentiable(*output[1:])


def _norm_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    x, weight, active, out, *moments = ctx.saved_tensors
    grads = _norm_bwd(grad, x, out, weight, active, moments, ctx.groups, ctx.relu, ctx.filled, ctx.added)
    return grads[0], grads[2], grads[3], None, grads[1] if ctx.added else None, None, None, None, None


_norm.register_autograd(_norm_backward, setup_context=_norm_setup)


def listed_window(
    x: Tensor, weight: Tensor | CastWeight, sites: Sites, stride: Any, padding: Any
) -> tuple[Window, list[Tensor]]:
    """The window of a convolution and its lists, kept where the sites keep them."""
    steps, pads = ((n, n) if isinstance(n, int) else tuple(n) for n in (stride, padding))
    kernel, source = values(weight).shape, input_map(x, sites)
    window = Window((kernel[2], kernel[3]), steps, pads)
    if isinstance(sites, ListedSites):
        return window, sites.lists(source, window)
    return window, window_lists(source, sites.active, window)


def masked_conv2d(x: Tensor, weight: Tensor | CastWeight, sites: Sites, *, stride: Any, padding: Any) -> Tensor:
    """The public operation on lists."""
    window, lists = listed_window(x, weight, sites, stride, padding)
    size = list(sites.active.shape[2:])
    return _conv(*operands(x, weight), lists, size, list(window.stride), list(window.padding), fills(sites))


def masked_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, sites: Sites, *, eps: float, residual: Tensor | None, relu: bool,
    group_size: int | None,
) -> Tensor:  # fmt: skip
    """The public operation over maps in place."""
    if residual is not None:
        residual = residual.to(x.dtype)
    groups = group_sizes(x.shape[0], group_size or 0)
    return _norm(x, weight.float(), bias.float(), sites.active, residual, groups, eps, relu, fills(sites))[0]


def conv_reasons(x: Tensor, weight: Tensor | CastWeight, sites: Sites, *_: Any, **__: Any) -> list[str]:
    """Why a convolution cannot run on lists."""
    found = triton_backend.operand_reasons({"x": x, "weight": values(weight)})
    kernel = values(weight).shape[2:]
    if kernel[0] * kernel[1] > 9 or max(kernel) > 3:
        found.append(f"kernels of up to 3x3 only, got {kernel[0]}x{kernel[1]}")
    if sites.active.numel() >= 1 << 31 or x[:, 0].numel() >= 1 << 31:
        found.append("maps must have fewer than 2^31 sites")
    return found


def _norm_reasons(x: Tensor, weight: Tensor, bias: Tensor, sites: Sites, **_: Any) -> list[str]:
    return triton_backend.operand_reasons({"x": x})


def avoid(x: Tensor, *arguments: Any, **_: Any) -> list[str]:
    """Why the automatic choice passes over the kernels: `masked_storage` gives listed sites where they are to run."""
    chosen = any(isinstance(a, ListedSites) for a in arguments)
    return triton_backend.avoid_on_cpu() or ([] if chosen else ["masked_storage did not choose it for this stage"])


def register_listed(op: Operation) -> None:
    """Register the Triton backend of `masked_conv2d` or `masked_batch_norm`."""
    conv = op.name == "masked_conv2d"
    register(
        op,
        "triton",
        masked_conv2d if conv else masked_batch_norm,
        unsupported_reasons=conv_reasons if conv else _norm_reasons,
        available=triton_backend.reasons,
        avoid=avoid,
    )
