"""In-batch InfoNCE (SimCLR, SeqCLR, DiG): every row against the rows of its own batch, with gradients on both sides.

`info_nce` is the mechanism: rows, candidates, and for each row which candidate is its positive and which it leaves out.
`nt_xent` is its two-sided case, in which both views are rows and candidates. Where the batch is spread over processes the
candidates are those of all, gathered by a function that sends their gradients back.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rcmstr_fast.ops import checks
from rcmstr_fast.ops.dispatch import operation, register, register_triton
from rcmstr_fast.ops.in_batch import backends, reference

_info_nce = operation("info_nce", reference.info_nce)


def info_nce(
    query: Tensor,
    candidates: Tensor,
    positive: Tensor,
    *,
    temperature: float,
    skip: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """-log(exp(q . c_positive / t) / sum over candidates of exp(q . c / t)), averaged over rows; never holds M x K.

    Args:
        query: [M, D] floating point, unit rows. Receives a gradient.
        candidates: [K, D] unit rows, the positive of every row among them. Receives a gradient.
        positive: [M] int64 in [0, K); the candidate that belongs to each row.
        temperature: t, above 0.
        skip: [M] int64 in [0, K); the candidate that a row leaves out of its sum, never its positive; None: none.
        backend: None (automatic), "reference", "chunked" or "triton" (float16 operands).
    Returns:
        0-d, float32 (float64 for float64 rows).
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree, no rows, or a temperature that is not above 0.
    """
    name = "info_nce"
    checks.check_tensor(name, "query", query, ("M", "D"))
    checks.check_not_empty(name, "query", query, "M")
    checks.check_tensor(name, "candidates", candidates, ("K", query.shape[1]), like="query")
    checks.check_not_empty(name, "candidates", candidates, "K")
    checks.check_tensor(name, "positive", positive, (len(query),), "int64", like="query")
    if skip is not None:
        checks.check_tensor(name, "skip", skip, (len(query),), "int64", like="query")
    checks.check_devices(name, query=query, candidates=candidates, positive=positive, skip=skip)
    checks.check_positive(name, temperature=temperature)
    return _info_nce(query, candidates, positive, temperature=temperature, skip=skip, backend=backend)


def nt_xent(
    a: Tensor,
    b: Tensor,
    temperature: float,
    *,
    gather: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Two-sided InfoNCE of the pairs (a_i, b_i): the candidates of a row are all rows of both views but itself.

    NT-Xent of SimCLR; Eq. 1 of SeqCLR divided by its number of rows.

    Args:
        a: [N, D] floating point, unit rows of the first view. Receives a gradient.
        b: [N, D] unit rows of the second view. Receives a gradient.
        temperature: t, above 0.
        gather: concatenates the rows [N, D] of all processes in rank order, with gradient; None: a single process.
        rank: of this process among those that `gather` asks; all give the same N.
        backend: as in `info_nce`.
    Returns:
        0-d mean over the 2 N rows of this process, float32 (float64 for float64 rows).
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree, fewer than two pairs, or a temperature that is not above 0.
    """
    checks.check_tensor("nt_xent", "a", a, ("N", "D"))
    checks.check_tensor("nt_xent", "b", b, tuple(a.shape), like="a")
    views = [a, b] if gather is None else [gather(a), gather(b)]
    total = len(views[0])
    if total < 2:
        raise ValueError(f"nt_xent: a must have 2 or more rows, the others are the negatives, got {total}")
    first = torch.arange(len(a), device=a.device) + rank * len(a)
    own, other = torch.cat([first, first + total]), torch.cat([first + total, first])
    rows = torch.cat([a, b])
    candidates = rows if gather is None else torch.cat(views)
    return info_nce(rows, candidates, other, temperature=temperature, skip=own, backend=backend)


register(_info_nce, "chunked", backends.on("chunked"))
register_triton(_info_nce, backends.on("triton"), backends.triton_reasons)
