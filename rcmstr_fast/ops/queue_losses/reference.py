"""Queue losses in plain PyTorch (paper Eq. 1-6); these hold the M x K similarities in memory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


class RelationalLoss(NamedTuple):
    """0-d tensors: `loss` = `info` + alpha * `kl`, each a mean over rows (and over the two queries, if two).

    Only `loss` carries a gradient; `info` and `kl` are for the log.
    """

    loss: Tensor
    info: Tensor
    kl: Tensor


class LossTerm(NamedTuple):
    """One term: a level (InfoNCE and KL of a query and its permuted query), or with `kl_only` a KL over pairs of rows.

    Attributes:
        query: [M, D] unit rows; receives a gradient.
        key: [M, D] unit rows; with `kl_only` [N, D].
        queue: [K, D].
        query_permuted: [M, D] or None; receives a gradient. Not with `kl_only`.
        alpha: weight of the KL in `loss`; of no effect with `kl_only`.
        kl_only: `loss` is the KL alone, `info` is 0.
        query_rows: [R] int64 or None; with `kl_only` the query row of each pair.
        key_rows: [R] int64 or None; likewise.
    """

    query: Tensor
    key: Tensor
    queue: Tensor
    query_permuted: Tensor | None = None
    alpha: float = 0.3
    kl_only: bool = False
    query_rows: Tensor | None = None
    key_rows: Tensor | None = None


def to_compute_dtype(query: Tensor, constant: Tensor) -> Tensor:
    """A constant in the arithmetic's dtype (float64 for float64 queries, float32 otherwise).

    Always a copy: backward reads it after the ring buffer it came from may have been overwritten.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    return constant.detach().to(dtype, copy=True)


def symmetric_kl(similarity: Tensor, key_similarity: Tensor, tau: float) -> Tensor:
    """1/2 KL(P||Q) + 1/2 KL(Q||P) of softmaxes over the queue, summed over it and averaged over rows."""
    log_q, log_p = log_softmax(similarity / tau, dim=1), log_softmax(key_similarity / tau, dim=1)
    forward = kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    backward = kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return (forward + backward) / 2


def relation_kl(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    tau: float = 0.04,
    query_rows: Tensor | None = None,
    key_rows: Tensor | None = None,
) -> Tensor:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.relation_kl`."""
    with torch.autocast(query.device.type, enabled=False):
        key, queue = to_compute_dtype(query, key), to_compute_dtype(query, queue)
        similarity, key_similarity = query.to(queue.dtype) @ queue.T, key @ queue.T
        if query_rows is not None:
            similarity = similarity.index_select(0, query_rows)
        if key_rows is not None:
            key_similarity = key_similarity.index_select(0, key_rows)
        return symmetric_kl(similarity, key_similarity, tau)


def relational_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    query_permuted: Tensor | None = None,
    tau_info: float = 0.07,
    tau_kl: float = 0.04,
    alpha: float = 0.3,
) -> RelationalLoss:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.relational_loss`."""
    with torch.autocast(query.device.type, enabled=False):
        key, queue = to_compute_dtype(query, key), to_compute_dtype(query, queue)
        key_similarity = key @ queue.T
        infos, kls = [], []
        for rows in (query,) if query_permuted is None else (query, query_permuted):
            rows = rows.to(key.dtype)
            similarity = rows @ queue.T
            logits = torch.cat([(rows * key).sum(dim=1, keepdim=True), similarity], dim=1) / tau_info
            infos.append(-log_softmax(logits, dim=1)[:, 0].mean())
            kls.append(symmetric_kl(similarity, key_similarity, tau_kl))
        info, kl = torch.stack(infos).mean(), torch.stack(kls).mean()
        return RelationalLoss(info + alpha * kl, info.detach(), kl.detach())


def relational_losses(
    terms: Sequence[LossTerm], *, tau_info: float = 0.07, tau_kl: float = 0.04, launch: str = "auto"
) -> list[RelationalLoss]:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.relational_losses`."""
    results = []
    for term in terms:
        if term.kl_only:
            rows = {"query_rows": term.query_rows, "key_rows": term.key_rows}
            kl = relation_kl(term.query, term.key, term.queue, tau=tau_kl, **rows)
            results.append(RelationalLoss(kl, torch.zeros_like(kl.detach()), kl.detach()))
        else:
            options = {"tau_info": tau_info, "tau_kl": tau_kl, "alpha": term.alpha}
            results.append(
                relational_loss(term.query, term.key, term.queue, query_permuted=term.query_permuted, **options)
            )
    return results
