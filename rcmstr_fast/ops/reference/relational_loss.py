"""Relational contrastive loss in plain PyTorch (paper Eq. 1-4); materialises the M x K similarities."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from rcmstr_fast.ops.reference.relation_kl import symmetric_kl, to_compute_dtype


class RelationalLoss(NamedTuple):
    """0-d tensors: `loss` = `info` + alpha * `kl`, each a mean over rows (and over the two queries, if two).

    Only `loss` carries a gradient; `info` and `kl` are for the log.
    """

    loss: Tensor
    info: Tensor
    kl: Tensor


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
