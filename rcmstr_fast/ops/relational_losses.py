"""All relational loss terms of a step in one call: levels and relations between levels."""

from collections.abc import Sequence

from rcmstr_fast.ops import checks, reference
from rcmstr_fast.ops.dispatch import operation
from rcmstr_fast.ops.queue_losses import register_queue_loss
from rcmstr_fast.ops.reference import LossTerm, RelationalLoss
from rcmstr_fast.ops.relation_kl import check_relation_kl
from rcmstr_fast.ops.relational_loss import check_relational_loss

LAUNCHES = ("auto", "scheduled", "separate")
_NAME = "relational_losses"
_relational_losses = operation(_NAME, reference.relational_losses)
register_queue_loss(_relational_losses)


def relational_losses(
    terms: Sequence[LossTerm],
    *,
    tau_info: float = 0.07,
    tau_kl: float = 0.04,
    launch: str = "auto",
    backend: str | None = None,
) -> list[RelationalLoss]:
    """Losses of several terms over queues: the levels of a step (paper Eq. 4) and its relations between levels (Eq. 6).

    A level gives what `relational_loss` gives, a term with `kl_only` what `relation_kl` gives; on a GPU all terms can
    share one launch a pass.

    Args:
        terms: at least one `LossTerm`, on one device.
        tau_info: above 0; temperature of InfoNCE.
        tau_kl: above 0; temperature of the KL.
        launch: "auto" (RCMSTR_FAST_LOSS_LAUNCH, else as measured: `kernels.tiles.SCHEDULED`), "scheduled" (one launch a
            pass where D is 64 or 128, levels come first and have as many queries each; only "triton" knows it) or
            "separate".
        backend: None (automatic), "reference", "chunked" or "triton".
    Returns:
        A term: `RelationalLoss(loss, info, kl)`, 0-d float32 (float64 for float64 queries); only `loss` carries a
        gradient, to query and query_permuted. NaN in any argument of a term gives NaN in that term.
    Raises:
        TypeError: an argument of a term is of another type.
        ValueError: there is no term, a term's shapes or devices disagree, `launch` is unknown.
    """
    if not terms:
        raise ValueError(f"{_NAME}: terms must hold at least one LossTerm, got none")
    checks.check_choice(_NAME, "launch", launch, LAUNCHES)
    for i, term in enumerate(terms):
        name = f"{_NAME}: term {i}"
        if not isinstance(term, LossTerm):
            raise TypeError(f"{name} must be a LossTerm, got {type(term).__name__}")
        if term.kl_only:
            if term.query_permuted is not None:
                raise ValueError(f"{name}: query_permuted must be None with kl_only, got a tensor")
            check_relation_kl(name, term.query, term.key, term.queue, tau_kl, term.query_rows, term.key_rows)
        else:
            if term.query_rows is not None or term.key_rows is not None:
                raise ValueError(f"{name}: query_rows and key_rows must be None without kl_only, got a tensor")
            rows = term.query, term.key, term.queue, term.query_permuted
            check_relational_loss(name, *rows, tau_info, tau_kl, term.alpha)
    widths = {term.query.shape[1] for term in terms}
    if len(widths) > 1:
        raise ValueError(f"{_NAME}: all terms must have one D, got {' and '.join(map(str, sorted(widths)))}")
    devices = {str(term.query.device) for term in terms}
    if len(devices) > 1:
        raise ValueError(f"{_NAME}: all terms must be on one device, got {' and '.join(sorted(devices))}")
    return _relational_losses(terms, tau_info=tau_info, tau_kl=tau_kl, launch=launch, backend=backend)
