"""Symmetric KL divergence of two relations to a queue in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


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
