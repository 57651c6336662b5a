"""Convolution and the batch norm behind it at the active sites of a mask, as one operation."""

from typing import Any

from torch import Tensor

from rcmstr_fast.ops import checks, listed_conv_norm, packed, reference
from rcmstr_fast.ops.dispatch import operation
from rcmstr_fast.ops.masked_conv import CastWeight, Pair, check_convolution, masked_conv2d
from rcmstr_fast.ops.masked_norm import masked_batch_norm
from rcmstr_fast.ops.reference import Sites
from rcmstr_fast.ops.reference.cast_weight import values

_masked_conv_norm = operation("masked_conv_norm", reference.masked_conv_norm)
_NAME = "masked_conv_norm"


def masked_conv_norm(
    x: Tensor,
    weight: Tensor | CastWeight,
    sites: Sites,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    group_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """masked_batch_norm(masked_conv2d(x, weight, sites), norm_weight, norm_bias, sites), the unit of the network.

    As one operation a backend can take the statistics while the convolution still holds its results.

    Args:
        x: as of `masked_conv2d`.
        weight: as of `masked_conv2d`.
        sites: as of `masked_conv2d`.
        norm_weight: [O] floating point.
        norm_bias: [O] floating point.
        stride: rows and columns.
        padding: rows and columns, zeros.
        eps: above 0; added to the variance.
        residual: like the result; added before ReLU, ignored at inactive sites.
        relu: apply ReLU.
        group_size: images that share statistics, as of `masked_batch_norm`; None: all.
        backend: None (automatic), "reference", "cpp", "triton" or "cuda".
    Returns:
        [B, O, h, w] in the dtype that `conv2d` gives (autocast applies), zero at inactive sites; rows [N, O] at packed
        stages.
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree, eps or group_size not above 0.
    """
    window = check_convolution(_NAME, x, weight, sites, stride, padding)
    outputs = values(weight).shape[0]
    for name, of_norm in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        checks.check_tensor(_NAME, name, of_norm, (outputs,), like="the outputs of weight")
    checks.check_devices(_NAME, x=x, norm_weight=norm_weight, norm_bias=norm_bias, residual=residual)
    checks.check_positive(_NAME, eps=eps)
    if group_size is not None:
        checks.check_positive(_NAME, group_size=group_size)
    options: dict[str, Any] = {"eps": eps, "residual": residual, "relu": relu, "group_size": group_size}
    if isinstance(sites, packed.StoredSites):
        y = masked_conv2d(x, weight, sites, stride=stride, padding=padding, backend=backend)
        return masked_batch_norm(y, norm_weight, norm_bias, sites, backend=backend, **options)
    if residual is not None:
        size = window.output_size((x.shape[2], x.shape[3]))
        checks.check_tensor(_NAME, "residual", residual, (x.shape[0], outputs, *size), like="the result")
    return _masked_conv_norm(
        x, weight, sites, norm_weight, norm_bias, stride=stride, padding=padding, backend=backend, **options
    )


def _packed_conv_norm(
    x: Tensor, weight: Tensor | CastWeight, sites: Sites, norm_weight: Tensor, norm_bias: Tensor, **options: Any
) -> Tensor:
    stored = packed.StoredSites.of(sites)
    return stored.rows.unpack(masked_conv_norm(x, weight, stored, norm_weight, norm_bias, **options))


packed.register_packed(_masked_conv_norm, _packed_conv_norm)
listed_conv_norm.register_listed_conv_norm(_masked_conv_norm)
