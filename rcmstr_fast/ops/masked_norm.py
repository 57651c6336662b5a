"""Batch normalisation over the active sites of a mask, with residual and ReLU."""

from typing import Any

from torch import Tensor

from rcmstr_fast.ops import checks, listed, packed, reference
from rcmstr_fast.ops.dispatch import operation
from rcmstr_fast.ops.reference import Sites
from rcmstr_fast.ops.reference.masked_norm import group_sizes as group_sizes

_masked_batch_norm = operation("masked_batch_norm", reference.masked_batch_norm)
_NAME = "masked_batch_norm"


def masked_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    sites: Sites,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    group_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalise with batch statistics of the active sites, add a residual, apply ReLU; zero at inactive sites.

    y = (x - mean) / sqrt(var + eps) * weight + bias (+ residual), with mean and biased variance a channel over the
    active sites of each group of images. There are no running statistics. A group without active sites gives zeros
    and zero gradients; one with a single site gives `bias` (+ residual).

    Args:
        x: [B, C, h, w] floating point; inactive sites may hold anything, also NaN. Or rows [N, C] with sites of
            `masked_storage`.
        weight: [C] floating point.
        bias: [C] floating point.
        sites: `active` [B, 1, h, w].
        eps: above 0; added to the variance.
        residual: like x; added before ReLU, ignored at inactive sites.
        relu: apply ReLU.
        group_size: images that share statistics, consecutive; None: all. The rest of the batch is a group of its own,
            but a rest of one image joins the group before it (as in `models.batch_norm`).
        backend: None (automatic), "reference", "cpp", "triton" or "cuda".
    Returns:
        [B, C, h, w] in the dtype of x, rows [N, C] at packed stages; arithmetic in float32 (float64 for float64 x).
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree, eps or group_size not above 0.
    """
    _check(x, weight, bias, sites, residual)
    checks.check_positive(_NAME, eps=eps)
    if group_size is not None:
        checks.check_positive(_NAME, group_size=group_size)
    if isinstance(sites, packed.StoredSites):
        if backend in (None, "cpp") and sites.packs(x):
            x, starts = packed.as_rows(x, sites.rows), sites.rows.group_starts(group_size)
            if residual is not None:
                residual = packed.as_rows(residual, sites.rows)
                checks.check_tensor(_NAME, "residual", residual, x.shape, like="x")
            return packed.batch_norm(x, weight, bias, starts, eps, residual, relu)[0]
        x = packed.as_map(x, sites.rows)
        residual = None if residual is None else packed.as_map(residual, sites.rows)
    return _masked_batch_norm(
        x, weight, bias, sites, eps=eps, residual=residual, relu=relu, group_size=group_size, backend=backend
    )


def _check(x: Tensor, weight: Tensor, bias: Tensor, sites: Sites, residual: Tensor | None) -> None:
    if x.dim() == 2 and isinstance(sites, packed.StoredSites):
        checks.check_tensor(_NAME, "x", x, (sites.rows.count, "C"), like="the active sites")
    else:
        checks.check_tensor(_NAME, "x", x, ("B", "C", "h", "w"))
        active = (x.shape[0], 1, x.shape[2], x.shape[3])
        checks.check_tensor(_NAME, "sites.active", sites.active, active, "bool", like="x")
    checks.check_tensor(_NAME, "weight", weight, (x.shape[1],), like="the channels of x")
    checks.check_tensor(_NAME, "bias", bias, (x.shape[1],), like="the channels of x")
    if residual is not None and not isinstance(sites, packed.StoredSites):
        checks.check_tensor(_NAME, "residual", residual, x.shape, like="x")
    checks.check_devices(
        _NAME, **{"x": x, "weight": weight, "bias": bias, "sites.active": sites.active, "residual": residual}
    )


def _packed_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, sites: Sites, **options: Any) -> Tensor:
    stored = packed.StoredSites.of(sites)
    return stored.rows.unpack(masked_batch_norm(x, weight, bias, stored, **options))


packed.register_packed(_masked_batch_norm, _packed_batch_norm)
listed.register_listed(_masked_batch_norm)
