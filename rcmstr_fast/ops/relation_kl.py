"""Symmetric KL divergence of two relations to a queue, with index maps for pairs of levels."""

from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.ops import checks, reference
from rcmstr_fast.ops.dispatch import operation
from rcmstr_fast.ops.queue_losses import register_queue_loss

_relation_kl = operation("relation_kl", reference.relation_kl)
register_queue_loss(_relation_kl)
_NAME = "relation_kl"


def check_relation_kl(
    op: str, query: Tensor, key: Tensor, queue: Tensor, tau: float, query_rows: Tensor | None, key_rows: Tensor | None
) -> None:
    """Raise what `relation_kl` raises, in the name of `op`."""
    checks.check_tensor(op, "query", query, ("M", "D"))
    width = query.shape[1]
    checks.check_tensor(op, "key", key, ("N", width), like="query")
    checks.check_tensor(op, "queue", queue, ("K", width), like="query")
    checks.check_not_empty(op, "queue", queue, "K")
    for name, rows in (("query_rows", query_rows), ("key_rows", key_rows)):
        if rows is not None:
            checks.check_tensor(op, name, rows, ("R",), "int64")
    query_pairs, key_pairs = (r if r is not None else t for r, t in ((query_rows, query), (key_rows, key)))
    if query_pairs.shape[0] != key_pairs.shape[0] or query_pairs.shape[0] == 0:
        raise ValueError(
            f"{op}: query rows and key rows must pair up, at least one, "
            f"got {query_pairs.shape[0]} and {key_pairs.shape[0]}"
        )
    checks.check_devices(op, query=query, key=key, queue=queue, query_rows=query_rows, key_rows=key_rows)
    checks.check_positive(op, tau=tau)
    if env.debug():
        checks.check_unit_rows(op, query=query, key=key)
        checks.check_queue(op, queue)
        for name, rows, table in (("query_rows", query_rows, query), ("key_rows", key_rows, key)):
            if rows is not None:
                checks.check_range(op, name, rows, table.shape[0])


def relation_kl(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    tau: float = 0.04,
    query_rows: Tensor | None = None,
    key_rows: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Symmetric KL of the relations of paired rows to a queue (paper Eq. 2; pairs of levels: Eq. 5-6).

    For each pair, Q = softmax(queue q / tau) and P = softmax(queue p / tau); the result is the mean over pairs
    of 1/2 KL(P||Q) + 1/2 KL(Q||P), summed over the queue.

    Args:
        query: [M, D] floating point, rows of length 1. Receives a gradient.
        key: [N, D] floating point, rows of length 1. No gradient.
        queue: [K, D] floating point, K >= 1. No gradient; may be overwritten in place before backward.
        tau: above 0; temperature.
        query_rows: [R] int64 in [0, M); the query row of each pair (rows may repeat). None: 0..M-1.
        key_rows: [R] int64 in [0, N); the key row of each pair. None: 0..N-1.
        backend: None (automatic), "reference", "chunked" or "triton".
    Returns:
        0-d float32 (float64 for float64 queries).
    Raises:
        TypeError: an argument has another dtype or is not a tensor.
        ValueError: shapes or devices disagree, there is no pair, K is 0, tau is not above 0.
    """
    check_relation_kl(_NAME, query, key, queue, tau, query_rows, key_rows)
    return _relation_kl(query, key, queue, tau=tau, query_rows=query_rows, key_rows=key_rows, backend=backend)
