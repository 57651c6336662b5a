"""Max pooling over active sites as a Triton kernel, as a custom operator."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import listed, triton_backend
from rcmstr_fast.ops.dispatch import Operation, register
from rcmstr_fast.ops.listed import nhwc
from rcmstr_fast.ops.reference import Sites
from rcmstr_fast.ops.reference.masked_conv import input_map


@torch.library.custom_op("rcmstr_fast::masked_max_pool2d", mutates_args=())
def _pool(x: Tensor, source: Tensor, active: Tensor, geometry: list[int], filled: bool) -> tuple[Tensor, Tensor]:
    from rcmstr_fast.kernels.masked_pool import masked_pool_fwd

    out = listed.room(x, x.shape[1], (active.shape[2], active.shape[3]), filled)
    which = torch.empty_like(out, dtype=torch.int8)
    masked_pool_fwd(nhwc(x), source.contiguous(), active.contiguous(), out, which, geometry)
    return out, which


@_pool.register_fake
def _(x, source, active, geometry, filled):  # type: ignore[no-untyped-def]
    out = listed.empty(x, x.shape[1], active.shape[2:])
    return out, torch.empty_like(out, dtype=torch.int8)


@torch.library.custom_op("rcmstr_fast::masked_max_pool2d_bwd", mutates_args=())
def _pool_bwd(grad: Tensor, which: Tensor, source: Tensor, active: Tensor, geometry: list[int], filled: bool) -> Tensor:
    from rcmstr_fast.kernels.masked_pool import masked_pool_bwd

    grad_x = listed.room(grad, grad.shape[1], (source.shape[2], source.shape[3]), filled)
    masked_pool_bwd(nhwc(grad), which, source.contiguous(), active.contiguous(), grad_x, geometry)
    return grad_x


@_pool_bwd.register_fake
def _(grad, which, source, active, geometry, filled):  # type: ignore[no-untyped-def]
    return listed.empty(grad, grad.shape[1], source.shape[2:])


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, source, active, ctx.geometry, ctx.filled = inputs
    ctx.save_for_backward(output[1], source, active)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    return _pool_bwd(grad, *ctx.saved_tensors, ctx.geometry, ctx.filled), None, None, None, None


_pool.register_autograd(_backward, setup_context=_setup)


def _masked_max_pool2d(x: Tensor, sites: Sites, *, kernel_size: Any, stride: Any, padding: Any) -> Tensor:
    pairs = ((n, n) if isinstance(n, int) else n for n in (kernel_size, stride, padding))
    geometry = [n for pair in pairs for n in pair]
    return _pool(x, input_map(x, sites), sites.active, geometry, listed.fills(sites))[0]


def _reasons(x: Tensor, sites: Sites, *, kernel_size: Any, stride: Any, padding: Any) -> list[str]:
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    found = triton_backend.operand_reasons({"x": x})
    return found + ([f"kernels of up to 127 taps only, got {kernel}"] if kernel[0] * kernel[1] > 127 else [])


def register_listed_pool(op: Operation) -> None:
    """Register the Triton backend of `masked_max_pool2d`."""
    register(
        op,
        "triton",
        _masked_max_pool2d,
        unsupported_reasons=_reasons,
        available=triton_backend.reasons,
        avoid=listed.avoid,
    )
