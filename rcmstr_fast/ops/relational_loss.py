"""Relational contrastive loss: InfoNCE plus the symmetric KL of two relations to a queue."""

from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.ops import checks, reference
from rcmstr_fast.ops.dispatch import operation
from rcmstr_fast.ops.queue_losses import register_queue_loss
from rcmstr_fast.ops.reference import RelationalLoss

_relational_loss = operation("relational_loss", reference.relational_loss)
register_queue_loss(_relational_loss)
_NAME = "relational_loss"


def check_relational_loss(
    op: str, query: Tensor, key: Tensor, queue: Tensor, query_permuted: Tensor | None, tau_info: float, tau_kl: float,
    alpha: float,
) -> None:  # fmt: skip
    """Raise what `relational_loss` raises, in the name of `op`."""
    checks.check_tensor(op, "query", query, ("M", "D"))
    checks.check_not_empty(op, "query", query, "M")
    checks.check_tensor(op, "key", key, query.shape, like="query")
    checks.check_tensor(op, "queue", queue, ("K", query.shape[1]), like="query")
    checks.check_not_empty(op, "queue", queue, "K")
    if query_permuted is not None:
        checks.check_tensor(op, "query_permuted", query_permuted, query.shape, like="query")
    checks.check_devices(op, query=query, key=key, queue=queue, query_permuted=query_permuted)
    checks.check_positive(op, tau_info=tau_info, tau_kl=tau_kl)
    checks.check_numbers(op, alpha=alpha)
    if env.debug():
        checks.check_unit_rows(op, query=query, key=key, query_permuted=query_permuted)
        checks.check_queue(op, queue)


def relational_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    query_permuted: Tensor | None = None,
    tau_info: float = 0.07,
    tau_kl: float = 0.04,
    alpha: float = 0.3,
    backend: str | None = None,
) -> RelationalLoss:
    """Relational contrastive loss of one level (paper Eq. 1-3; with `query_permuted` Eq. 4).

    With a = queue q, b = queue p, Q = softmax(a / tau_kl) and P = softmax(b / tau_kl) of one row,
    `info` is the cross-entropy of the positive q.p / tau_info among [q.p, a] / tau_info, `kl` is
    1/2 KL(P||Q) + 1/2 KL(Q||P) summed over the queue, and `loss` = info + alpha kl; all are means over rows.

    Args:
        query: [M, D] floating point, rows of length 1; online features. Receives a gradient.
        key: [M, D] floating point, rows of length 1; momentum features of the same places. No gradient.
        queue: [K, D] floating point, K >= 1; keys of earlier steps. No gradient; may be overwritten in place
            (`enqueue_`) before backward without changing the gradient.
        query_permuted: [M, D] floating point; second query (from the permuted images, order restored) with the
            same keys. Each result is then the mean of the two queries' values. Receives a gradient.
        tau_info: above 0; temperature of `info`.
        tau_kl: above 0; temperature of `kl`.
        alpha: weight of `kl` in `loss`.
        backend: None (automatic), "reference", "chunked" or "triton".
    Returns:
        `loss`, `info`, `kl`: 0-d float32 (float64 for float64 queries), computed at least in that precision
        whatever the autocast state. Only `loss` carries a gradient. NaN in any argument gives NaN.
    Raises:
        TypeError: a tensor is not floating-point, or another argument no number.
        ValueError: ranks, D, M or devices differ, M or K is 0, a temperature is not above 0.
    """
    check_relational_loss(_NAME, query, key, queue, query_permuted, tau_info, tau_kl, alpha)
    return _relational_loss(
        query,
        key,
        queue,
        query_permuted=query_permuted,
        tau_info=tau_info,
        tau_kl=tau_kl,
        alpha=alpha,
        backend=backend,
    )
