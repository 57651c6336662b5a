"""In-batch InfoNCE in plain PyTorch: what `ops.info_nce` and `ops.nt_xent` compute."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    query: Tensor, candidates: Tensor, positive: Tensor, *, temperature: float, skip: Tensor | None = None
) -> Tensor:
    """-log(exp(q . c_positive / t) / sum over candidates of exp(q . c / t)), averaged over rows (SimCLR, Eq. 1).

    Args:
        query: [M, D] floating point unit rows.
        candidates: [K, D] unit rows, the positive of every row among them.
        positive: [M] int64, the candidate that belongs to each row.
        temperature: t.
        skip: [M] int64, the candidate that a row leaves out of its sum (itself); None: none.
    Returns:
        0-d, float32 (float64 for float64 rows), with gradients in query and candidates.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(dtype) @ candidates.to(dtype).T / temperature
    if skip is not None:
        logits = logits.scatter(1, skip[:, None], float("-inf"))
    return F.cross_entropy(logits, positive)


def nt_xent(a: Tensor, b: Tensor, *, temperature: float) -> Tensor:
    """Two-sided InfoNCE of the pairs (a_i, b_i) among all rows of both but the row itself.

    Args:
        a: [N, D] unit rows.
        b: [N, D] unit rows.
        temperature: t.
    Returns:
        0-d mean over the 2 N rows, with gradients in a and b.
    """
    rows, place = torch.cat([a, b]), torch.arange(2 * len(a), device=a.device)
    return info_nce(rows, rows, place.roll(len(a)), temperature=temperature, skip=place)
