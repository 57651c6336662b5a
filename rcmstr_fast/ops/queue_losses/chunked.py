"""Queue losses a few rows at a time: the M x K similarities never exist at once, and gradients come with the values.

A chunk of rows meets the whole queue at once, so its softmaxes are exact and need no rescaling, and the similarities
are used for the gradient while they are still in the cache. With a = query @ queue.T / tau_kl, b = key @ queue.T /
tau_kl and d = b - a, the symmetric KL is (E_P[d] - E_Q[d]) / 2, and its gradient in a is (Q (1 + E_Q[d] - d) - P) / 2;
docs/ops/relational_loss.md derives both. Arithmetic is float32 (float64 for float64 queries). The work between the two
matrix products of a chunk is done by csrc/loss_rows.h for float32 on a CPU, else by `_rows`. Results are bitwise
repeatable for a fixed number of threads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rcmstr_fast.ops import chunks, native
from rcmstr_fast.ops.queue_losses.reference import LossTerm
from rcmstr_fast.ops.rows import addresses

#: Similarities of a chunk of rows with all K keys.
CHUNK = chunks.declare("relational_losses")


def rows_per_chunk(keys: int) -> int:
    """Rows a chunk for a queue of `keys` rows."""
    return chunks.rows(CHUNK, keys)


class _Info(NamedTuple):
    """The InfoNCE of a chunk.

    Attributes:
        positive: [R] similarities of query and key over tau_info.
        ratio: tau_kl / tau_info.
        scale: weight of its gradient.
    """

    positive: Tensor
    ratio: float
    scale: float


class _Rows(NamedTuple):
    """Results of the R rows of a chunk.

    Attributes:
        kl: [R].
        info: [R] InfoNCE; empty for the KL alone.
        rest: [R] one minus the probability of the positive; empty for the KL alone.
        weight: [R, K] gradient in the similarities, or None where none was asked for.
    """

    kl: Tensor
    info: Tensor
    rest: Tensor
    weight: Tensor | None


def _rows(
    a: Tensor, b: Tensor, p: Tensor, place: Tensor | None, scale_kl: float, info: _Info | None, with_gradient: bool
) -> _Rows:
    """Losses of a chunk of rows, and their gradients in the similarities of the queries.

    Args:
        a: [R, K] similarities of the queries with the queue, over tau_kl; overwritten.
        b: [R or fewer, K] those of the keys.
        p: softmax of b.
        place: [R] int64, the row of `b` and `p` of each row; None: its own.
        scale_kl: weight of the KL's gradient.
        info: None: the KL alone.
        with_gradient: False skips `weight`.
    """
    if native.has("loss_rows") and a.device.type == "cpu" and a.dtype == torch.float32:
        return _compiled_rows(a, b, p, place, scale_kl, info, with_gradient)
    if place is not None:
        b, p = b.index_select(0, place), p.index_select(0, place)
    q = torch.softmax(a, dim=1)
    weight, losses, rest = None, a.new_empty(0), a.new_empty(0)
    if info is not None:
        losses, rest, weight = _info_rows(a * info.ratio, info, with_gradient)
    d = torch.sub(b, a, out=a)
    mean_q = torch.linalg.vecdot(q, d)
    kl = (torch.linalg.vecdot(p, d) - mean_q) / 2
    if with_gradient:
        weight_kl = d.neg_().add_((1 + mean_q)[:, None]).mul_(q).sub_(p).mul_(0.5 * scale_kl)
        weight = weight_kl if weight is None else weight.add_(weight_kl)
    return _Rows(kl, losses, rest, weight)


def _info_rows(logits: Tensor, info: _Info, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """InfoNCE a row, one minus the probability of the positive, and the scaled softmax over the queue (in `logits`)."""
    largest = torch.maximum(logits.amax(dim=1), info.positive)
    mass = logits.sub_(largest[:, None]).exp_().sum(dim=1)
    own = torch.exp(info.positive - largest)
    total = mass + own
    losses = torch.log1p(mass + (own - 1)) - (info.positive - largest)  # exact where the positive dominates: own is 1
    return losses, mass / total, logits.mul_((info.scale / total)[:, None]) if with_gradient else None


def _compiled_rows(
    a: Tensor, b: Tensor, p: Tensor, place: Tensor | None, scale_kl: float, info: _Info | None, with_gradient: bool
) -> _Rows:
    kl, (losses, rest) = a.new_empty(len(a)), a.new_empty(2, 0 if info is None else len(a))
    weight = torch.empty_like(a) if with_gradient else None
    positive, ratio, scale_info = (None, 1.0, 0.0) if info is None else (info.positive.contiguous(), *info[1:])
    tensors = (a, b, p, place, positive, weight, losses, rest, kl)
    native.function("loss_rows")(*addresses(*tensors), *a.shape, ratio, scale_info, scale_kl, torch.get_num_threads())
    return _Rows(kl, losses, rest, weight)


def level(
    term: LossTerm, tau_info: float, tau_kl: float, with_gradient: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """A term that is a level.

    Returns:
        `loss, info, kl` (0-d) of `ops.relational_loss`, and the gradients [M, D] of the loss in each query, in the
        dtype of the arithmetic (none where none is asked for).
    """
    query, key, queue = term.query, term.key, term.queue
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries = [rows.to(dtype) for rows in (query, term.query_permuted) if rows is not None]
    key, queue = key.to(dtype), queue.to(dtype)
    count, step = query.shape[0], rows_per_chunk(queue.shape[0])
    gradients = [torch.empty_like(rows, memory_format=torch.contiguous_format) for rows in queries if with_gradient]
    infos, kls = (query.new_empty(len(queries), count, dtype=dtype) for _ in range(2))
    share = 1 / (count * len(queries)) if count else 0.0
    for start in range(0, count, step):
        here = slice(start, start + step)
        b = (key[here] / tau_kl) @ queue.T
        p = torch.softmax(b, dim=1)
        for i, rows in enumerate(queries):
            a = (rows[here] / tau_kl) @ queue.T
            positive = torch.linalg.vecdot(rows[here], key[here]) / tau_info
            of_info = _Info(positive, tau_kl / tau_info, share / tau_info)
            found = _rows(a, b, p, None, share * term.alpha / tau_kl, of_info, with_gradient)
            kls[i, here], infos[i, here] = found.kl, found.info
            if found.weight is not None:
                torch.matmul(found.weight, queue, out=gradients[i][here])
                gradients[i][here].addcmul_(key[here], found.rest[:, None], value=-share / tau_info)
    info, kl = infos.mean(), kls.mean()
    return (info + term.alpha * kl, info, kl), gradients


def pairs(term: LossTerm, tau: float, with_gradient: bool) -> tuple[Tensor, list[Tensor]]:
    """A term that is the KL over pairs of rows.

    Returns:
        The KL (0-d) of `ops.relation_kl`, and its gradient [M, D] in the query, in the dtype of the arithmetic (none
        where none is asked for).
    """
    query, key = term.query, term.key
    dtype = torch.promote_types(query.dtype, torch.float32)
    number = (query if term.query_rows is None else term.query_rows).shape[0]
    every = torch.arange(number, device=query.device)
    query_rows = every if term.query_rows is None else term.query_rows
    key_rows = every if term.key_rows is None else term.key_rows
    queue = term.queue.to(dtype)
    step = rows_per_chunk(queue.shape[0])
    gradients = [query.new_zeros(query.shape, dtype=dtype)] if with_gradient else []
    kls = query.new_empty(number, dtype=dtype)
    for start in range(0, number, step):
        here = slice(start, start + step)
        distinct, place = torch.unique_consecutive(key_rows[here], return_inverse=True)  # many pairs share a key
        b = (key.index_select(0, distinct).to(dtype) / tau) @ queue.T
        p = torch.softmax(b, dim=1)
        a = (query.index_select(0, query_rows[here]).to(dtype) / tau) @ queue.T
        found = _rows(a, b, p, place, 1 / (number * tau), None, with_gradient)
        kls[here] = found.kl
        if found.weight is not None:
            gradients[0].index_add_(0, query_rows[here], found.weight @ queue)
    return kls.mean(), gradients


def relational_losses(
    terms: Sequence[LossTerm], tau_info: float, tau_kl: float, with_gradient: bool, launch: str
) -> tuple[Tensor, Tensor]:
    """Values [terms, 3] and gradients [R, D] of `ops.relational_losses`, one term after the other.

    `launch` belongs to the calling convention; there is nothing to launch here.
    """
    values, gradients = [], []
    for term in terms:
        if term.kl_only:
            kl, found = pairs(term, tau_kl, with_gradient)
            values.append(torch.stack([kl, torch.zeros_like(kl), kl]))
        else:
            value, found = level(term, tau_info, tau_kl, with_gradient)
            values.append(torch.stack(value))
        gradients += found
    first = values[0].new_empty(0, terms[0].query.shape[1])
    return torch.stack(values), torch.cat(gradients) if gradients else first
