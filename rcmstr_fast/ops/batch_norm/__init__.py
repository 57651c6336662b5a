"""Batch normalisation over groups of images, with residual and ReLU in the same pass."""

from torch import Tensor

from rcmstr_fast.ops import checks, native
from rcmstr_fast.ops.batch_norm import cpu, reference, triton
from rcmstr_fast.ops.batch_norm.reference import GroupedNorm as GroupedNorm
from rcmstr_fast.ops.batch_norm.reference import group_sizes as group_sizes
from rcmstr_fast.ops.dispatch import operation, register, register_triton

_NAME = "grouped_batch_norm"
_grouped_batch_norm = operation(_NAME, reference.grouped_batch_norm)
register_triton(_grouped_batch_norm, triton.grouped_batch_norm, triton.reasons)
register(
    _grouped_batch_norm,
    "cpp",
    cpu.grouped_batch_norm,
    unsupported_reasons=cpu.reasons,
    available=native.reasons,
    avoid=cpu.avoid,
)


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

    out = (x - mean) / sqrt(var + eps) * weight + bias (+ residual), where mean and biased variance are those of a
    channel over a group of images.

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
