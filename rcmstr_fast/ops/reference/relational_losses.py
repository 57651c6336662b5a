"""All loss terms of a step in plain PyTorch, one after the other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rcmstr_fast.ops.reference.relation_kl import relation_kl
from rcmstr_fast.ops.reference.relational_loss import RelationalLoss, relational_loss


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
            results.append(
                relational_loss(
                    term.query, term.key, term.queue, query_permuted=term.query_permuted,
                    tau_info=tau_info, tau_kl=tau_kl, alpha=term.alpha,
                )
            )  # fmt: skip
    return results
