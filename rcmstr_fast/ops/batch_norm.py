"""Batch normalisation over groups of images, with residual and ReLU in the same pass."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import checks, packed, reference, site_rows, triton_backend
from rcmstr_fast.ops.dispatch import operation, register
from rcmstr_fast.ops.reference.batch_norm import GroupedNorm as GroupedNorm
from rcmstr_fast.ops.reference.masked_norm import group_sizes

_grouped_batch_norm = operation("grouped_batch_norm", reference.grouped_batch_norm)
_NAME = "grouped_batch_norm"


def grouped_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    passes: int = 1,
    group_size: int = 0,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    backend: str | None = None,
) -> GroupedNorm:
    """Normalise with batch statistics, add a residual, apply ReLU.

    out = (x - mean) / sqrt(var + eps) * weight + bias (+ residual), with mean and biased variance a channel over each
    group of images.

    Args:
        x: [B, C, h, w] or [B, .., C] (other than four dimensions), floating point.
        weight: [C] float32 (float64 for float64 x).
        bias: like weight.
        passes: equal parts of the batch that share no statistics; divides B.
        group_size: consecutive images of a part that share statistics; 0: all. The rest of a part is a group of its
            own, but a rest of one image joins the group before it.
        eps: above 0; added to the variance.
        residual: like x; added before ReLU.
        relu: apply ReLU.
        backend: None (automatic), "reference", "cpp" or "triton".
    Returns:
        `out` like x; `mean` and unbiased variance `var` [groups, C] in the dtype of weight, without gradient.
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree, B is no multiple of passes.
    """
    if x.dim() < 2:
        raise ValueError(f"{_NAME}: x must be [B, C, h, w] or [B, .., C], got {list(x.shape)}")
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    checks.check_tensor(_NAME, "x", x, x.shape)
    checks.check_tensor(_NAME, "weight", weight, (channels,), like="the channels of x")
    checks.check_tensor(_NAME, "bias", bias, (channels,), like="the channels of x")
    if residual is not None:
        checks.check_tensor(_NAME, "residual", residual, x.shape, like="x")
    checks.check_positive(_NAME, passes=passes, eps=eps)
    if x.shape[0] % passes:
        raise ValueError(f"{_NAME}: the batch must be a multiple of {passes} passes, got {list(x.shape)}")
    checks.check_devices(_NAME, x=x, weight=weight, bias=bias, residual=residual)
    return _grouped_batch_norm(
        x, weight, bias, passes=passes, group_size=group_size, eps=eps, residual=residual, relu=relu, backend=backend
    )


def _rows_in_memory(x: Tensor) -> Tensor:
    """x with its channels side by side in memory."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def _groups(x: Tensor, passes: int, group_size: int) -> tuple[int, list[int]]:
    """Rows (sites) of a pass and of each of its groups."""
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    sites = x[0].numel() // channels
    images = x.shape[0] // passes
    return images * sites, [size * sites for size in group_sizes(images, group_size)]


@torch.library.custom_op("rcmstr_fast::grouped_batch_norm", mutates_args=())
def _norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, passes: int, group_size: int, eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from rcmstr_fast.kernels.batch_norm import Groups, batch_norm_fwd

    x = _rows_in_memory(x)
    out = torch.empty_like(x)
    groups = Groups(*_division(x, passes, group_size), len(weight), x.device)
    residual = None if residual is None else _rows_in_memory(residual)
    mean, rstd, var = batch_norm_fwd(x, weight, bias, residual, out, groups, eps, relu)
    return out, mean, rstd, var


def _division(x: Tensor, passes: int, group_size: int) -> tuple[int, int, list[int]]:
    rows, sizes = _groups(x, passes, group_size)
    return rows, passes, sizes


@_norm.register_fake
def _(x, weight, bias, residual, passes, group_size, eps, relu):  # type: ignore[no-untyped-def]
    number = passes * len(group_sizes(x.shape[0] // passes, group_size))
    mean, rstd, var = (weight.new_empty(number, len(weight)) for _ in range(3))
    return torch.empty_like(_rows_in_memory(x)), mean, rstd, var


@torch.library.custom_op("rcmstr_fast::grouped_batch_norm_bwd", mutates_args=())
def _norm_bwd(
    grad: Tensor, x: Tensor, out: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, passes: int,
    group_size: int, relu: bool, added: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from rcmstr_fast.kernels.batch_norm import Groups, batch_norm_bwd

    x, grad = _rows_in_memory(x), _rows_in_memory(grad)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if added else None
    groups = Groups(*_division(x, passes, group_size), len(weight), x.device)
    grad_weight, grad_bias = batch_norm_bwd(
        grad, x, out, weight, bias, mean, rstd, grad_x, grad_residual, groups, relu
    )  # fmt: skip
    residual = x.new_empty(0) if grad_residual is None else grad_residual
    return grad_x, residual, grad_weight.clone(), grad_bias.clone()


@_norm_bwd.register_fake
def _(grad, x, out, weight, bias, mean, rstd, passes, group_size, relu, added):  # type: ignore[no-untyped-def]
    grad_x, residual = (torch.empty_like(_rows_in_memory(x)) for _ in range(2))
    return grad_x, residual if added else x.new_empty(0), torch.empty_like(weight), torch.empty_like(bias)


def _norm_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, residual, ctx.passes, ctx.group_size, _, ctx.relu = inputs
    ctx.added = residual is not None
    ctx.save_for_backward(x, output[0] if ctx.relu and ctx.added else x, weight, bias, output[1], output[2])
    ctx.mark_non_differentiable(*output[1:])


def _norm_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    grads = _norm_bwd(grad, *ctx.saved_tensors, ctx.passes, ctx.group_size, ctx.relu, ctx.added)
    return grads[0], grads[2], grads[3], grads[1] if ctx.added else None, None, None, None, None


_norm.register_autograd(_norm_backward, setup_context=_norm_setup)


def _triton(
    x: Tensor, weight: Tensor, bias: Tensor, *, passes: int, group_size: int, eps: float, residual: Tensor | None,
    relu: bool,
) -> GroupedNorm:  # fmt: skip
    residual = None if residual is None else residual.to(x.dtype)
    out, mean, _, var = _norm(x, weight.float(), bias.float(), residual, passes, group_size, eps, relu)
    return GroupedNorm(out, mean, var)


def _triton_reasons(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> list[str]:
    found = triton_backend.operand_reasons({"x": x})
    return found + ([] if x.numel() else ["x must not be empty"])


register(
    _grouped_batch_norm, "triton", _triton,
    unsupported_reasons=_triton_reasons, available=triton_backend.reasons, avoid=triton_backend.avoid_on_cpu,
)  # fmt: skip


def _cpp(
    x: Tensor, weight: Tensor, bias: Tensor, *, passes: int, group_size: int, eps: float, residual: Tensor | None,
    relu: bool,
) -> GroupedNorm:  # fmt: skip
    """Rows of C channels, as packed ones: one pass for the statistics, one that normalises, adds and applies ReLU."""

    def rows(y: Tensor) -> Tensor:
        return (y.movedim(1, -1) if y.dim() == 4 else y).reshape(-1, len(weight))

    sizes = _groups(x, passes, group_size)[1] * passes
    starts = list(accumulate(sizes, initial=0))
    added = None if residual is None else rows(residual)
    out, mean, var = packed.batch_norm(rows(x), weight, bias, starts, eps, added, relu)
    if x.dim() != 4:
        return GroupedNorm(out.view(x.shape), mean, var)
    return GroupedNorm(out.view(x.shape[0], *x.shape[2:], len(weight)).movedim(-1, 1), mean, var)


def _cpp_reasons(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> list[str]:
    found = packed.unsupported_rows(x)
    if torch.compiler.is_compiling():
        found.append("its C++ functions are opaque to torch.compile")
    return found + ([] if x.numel() else ["x must not be empty"])


def _cpp_avoid(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> list[str]:
    rows = x.is_contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.is_contiguous()
    return [] if rows else ["the channels of x do not lie side by side in memory"]


register(
    _grouped_batch_norm, "cpp", _cpp, unsupported_reasons=_cpp_reasons, available=site_rows.reasons, avoid=_cpp_avoid
)
