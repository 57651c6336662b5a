"""`info_nce` a few rows at a time in plain PyTorch: each chunk of rows meets all candidates once."""

import torch
from torch import Tensor

from rcmstr_fast.ops import chunks

#: Similarities of a chunk of rows with all candidates.
CHUNK = chunks.declare("info_nce")


def info_nce(
    query: Tensor,
    candidates: Tensor,
    positive: Tensor,
    skip: Tensor | None,
    temperature: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of `ops.info_nce`.

    With p the softmax of a row, the gradient in its logits is (p - onehot(positive)) / M; the products with candidates
    and rows follow while the chunk is in the cache.

    Args:
        query: [M, D] floating point.
        candidates: [K, D].
        positive: [M] int64.
        skip: [M] int64 or None.
        temperature: t.
        with_gradient: False skips the gradients.
    Returns:
        The loss 0-d and the gradients [M, D] and [K, D] (empty without), float32 or, for float64 rows, float64.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, candidates = query.to(dtype), candidates.to(dtype)
    count, step = len(query), chunks.rows(CHUNK, len(candidates))
    losses = query.new_empty(count)
    grad_query = torch.empty_like(query) if with_gradient else query.new_empty(0, query.shape[1])
    grad_candidates = torch.zeros_like(candidates) if with_gradient else candidates.new_empty(0, query.shape[1])
    for start in range(0, count, step):
        here = slice(start, start + step)
        rows = query[here] / temperature
        logits = rows @ candidates.T
        if skip is not None:
            logits.scatter_(1, skip[here, None], float("-inf"))
        own = logits.gather(1, positive[here, None])
        total = torch.logsumexp(logits, dim=1, keepdim=True)
        losses[here] = (total - own).squeeze(1)
        if with_gradient:
            weight = logits.sub_(total).exp_()
            weight.scatter_add_(1, positive[here, None], torch.full_like(own, -1.0))
            torch.matmul(weight, candidates, out=grad_query[here])
            grad_candidates.addmm_(weight.T, rows)
    if with_gradient:
        grad_query.mul_(1 / (count * temperature))
        grad_candidates.mul_(1 / count)
    return losses.mean(), grad_query, grad_candidates
