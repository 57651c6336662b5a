"""The losses over queues of keys.

The relation of a row is the softmax of its similarities to the rows of a queue. The loss of a level is InfoNCE plus
the symmetric KL divergence between the relations of query and key; between two levels there is the KL divergence alone,
over pairs of rows. There is one operation, `relational_losses` over a list of terms; `relational_loss` and
`relation_kl` are lists of one.
"""

from collections.abc import Sequence

from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.ops import checks
from rcmstr_fast.ops.dispatch import operation, register, register_triton
from rcmstr_fast.ops.queue_losses import operator, reference, tile_choice, triton
from rcmstr_fast.ops.queue_losses.reference import LossTerm, RelationalLoss

TILES = (tile_choice.STATS, tile_choice.GRADIENT)
LAUNCHES = ("auto", "scheduled", "separate")
_NAME = "relational_losses"
_relational_losses = operation(_NAME, reference.relational_losses)
register_triton(_relational_losses, operator.losses_on("triton"), triton.reasons)
register(_relational_losses, "chunked", operator.losses_on("chunked"))


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
        launch: "auto" (RCMSTR_FAST_LOSS_LAUNCH, else as measured in this run, else "scheduled"), "scheduled" (one launch
            a pass where D is 64 or 128, levels come first and have as many queries each, the gradient of D = 128 on an
            H200 or B200 only; "triton" alone knows it) or "separate".
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
            _check_pairs(name, term, tau_kl, tau_name="tau_kl")
        else:
            _check_level(name, term, tau_info, tau_kl)
    widths = {term.query.shape[1] for term in terms}
    if len(widths) > 1:
        raise ValueError(f"{_NAME}: all terms must have one D, got {' and '.join(map(str, sorted(widths)))}")
    devices = {str(term.query.device) for term in terms}
    if len(devices) > 1:
        raise ValueError(f"{_NAME}: all terms must be on one device, got {' and '.join(sorted(devices))}")
    return _relational_losses(terms, tau_info=tau_info, tau_kl=tau_kl, launch=launch, backend=backend)


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
    term = LossTerm(query, key, queue, query_permuted, alpha)
    _check_level("relational_loss", term, tau_info, tau_kl)
    return _relational_losses([term], tau_info=tau_info, tau_kl=tau_kl, launch="separate", backend=backend)[0]


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
    term = LossTerm(query, key, queue, kl_only=True, query_rows=query_rows, key_rows=key_rows)
    _check_pairs("relation_kl", term, tau)
    return _relational_losses([term], tau_info=tau, tau_kl=tau, launch="separate", backend=backend)[0].loss


def _check_level(op: str, term: LossTerm, tau_info: float, tau_kl: float) -> None:
    """Raise what `relational_loss` raises, in the name of `op`."""
    query, key, queue, query_permuted, alpha, _, query_rows, key_rows = term
    if query_rows is not None or key_rows is not None:
        raise ValueError(f"{op}: query_rows and key_rows must be None without kl_only, got a tensor")
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


def _check_pairs(op: str, term: LossTerm, tau: float, tau_name: str = "tau") -> None:
    """Raise what `relation_kl` raises, in the name of `op`."""
    query, key, queue, permuted, _, _, query_rows, key_rows = term
    if permuted is not None:
        raise ValueError(f"{op}: query_permuted must be None with kl_only, got a tensor")
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
    checks.check_positive(op, **{tau_name: tau})
    if env.debug():
        checks.check_unit_rows(op, query=query, key=key)
        checks.check_queue(op, queue)
        for name, rows, table in (("query_rows", query_rows, query), ("key_rows", key_rows, key)):
            if rows is not None:
                checks.check_range(op, name, rows, table.shape[0])
