"""Launchers of all loss terms of a step: each pass over the queues in one launch, or one launch a term.

Both ways share operands in fp16 (a queue or a key that two terms use is converted once), the row-wise kernels
and the layout of partial results. In one launch the partial gradients of all terms live together, within
`tiles.WORKSPACE_BYTES`; the split of the queues is `tiles.schedule`. Nothing synchronises.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import triton
from torch import Tensor

from rcmstr_fast.kernels import runtime
from rcmstr_fast.kernels.queue_losses import scheduled, tiles
from rcmstr_fast.kernels.queue_losses.problem import Problem, half, level_problem, pairs_problem


class Term(Protocol):
    """One term; see `rcmstr_fast.ops.LossTerm`."""

    query: Tensor
    key: Tensor
    queue: Tensor
    query_permuted: Tensor | None
    query_rows: Tensor | None
    key_rows: Tensor | None
    alpha: float
    kl_only: bool


def _shared_half() -> Callable[[Tensor], Tensor]:
    """`half` that converts a tensor once, however many terms hold it."""
    made: dict[tuple, tuple[Tensor, Tensor]] = {}

    def convert(rows: Tensor) -> Tensor:
        key = (rows.data_ptr(), rows.shape, rows.stride(), rows.dtype)
        if key not in made:
            made[key] = (rows, half(rows))  # the source stays alive, so its address stays its own
        return made[key][1]

    return convert


def problems_of(terms: Sequence[Term], tau_info: float, tau_kl: float) -> list[Problem]:
    """The terms on the device."""
    convert, made = _shared_half(), []
    for term in terms:
        if term.kl_only:
            rows = term.query_rows, term.key_rows
            made.append(pairs_problem(term.query, term.key, term.queue, tau_kl, *rows, convert))
        else:
            queries = [term.query] if term.query_permuted is None else [term.query, term.query_permuted]
            made.append(level_problem(queries, term.key, term.queue, tau_info, tau_kl, term.alpha, convert))
    return made


def can_schedule(problems: Sequence[Problem]) -> bool:
    """Whether one launch can hold the terms: a level among them, levels before pairs, as many queries in each level."""
    levels = [p for p in problems if p.tau_info is not None]
    return (
        problems[0].width in tiles.SCHEDULED_WIDTHS
        and bool(levels)
        and all(p.tau_info is not None for p in problems[: len(levels)])
        and len({p.queries.shape[0] for p in levels}) == 1
    )


def launch_all(problems: Sequence[Problem], kind: str, coefficients: Sequence[Tensor] = ()) -> list[Tensor]:
    """The "stats" or "gradient" pass of all terms in one launch; partials of each as of `Problem.launch`."""
    device, width = problems[0].queries.device, problems[0].width
    tile = problems[0].tile(kind)
    programs = [triton.cdiv(p.rows, tile.block_m) * p.layers(tile, kind) for p in problems]
    work = []
    for p, count in zip(problems, programs):
        shared = min(tile.queries, p.queries.shape[0])
        cost = 1 + shared * (1 if kind == "stats" else 1 + (tile.block_d or width) / width)
        size = 4 * p.queries.shape[0] * math.prod(p.partials_of(kind))
        work.append(tiles.Work(count, triton.cdiv(p.queue.shape[0], tile.block_n), cost, size))
    parts = tiles.schedule(tuple(work), runtime.multiprocessors(device) * tile.resident)
    sizes = [triton.cdiv(w.key_tiles, n) * tile.block_n for w, n in zip(work, parts)]
    counts = [triton.cdiv(p.queue.shape[0], size) for p, size in zip(problems, sizes)]
    firsts = [sum(c * n for c, n in zip(programs[:i], counts)) for i in range(len(problems) + 1)]
    partials = [
        torch.empty((n, p.queries.shape[0], *p.partials_of(kind)), dtype=torch.float32, device=device)
        for p, n in zip(problems, counts)
    ]
    levels = sum(p.tau_info is not None for p in problems)
    n_info, n_kl = problems[0].powers
    between = problems[levels:]
    stats = kind == "stats"
    kernel = scheduled._scheduled_stats_kernel if stats else scheduled._scheduled_gradient_kernel
    kernel[(firsts[-1],)](
        tuple(p.queries for p in problems), tuple(p.keys for p in problems), tuple(p.queue for p in problems),
        *(() if stats else (tuple(coefficients),)), tuple(partials),
        tuple(p.query_rows for p in between), tuple(p.key_rows for p in between),
        tuple(firsts[:-1]), tuple(p.rows for p in problems), tuple(p.queries.shape[1] for p in problems),
        tuple(p.keys.shape[0] for p in problems), tuple(p.queue.shape[0] for p in problems), tuple(sizes),
        *problems[0].scales,
        D=width, QUERIES=tile.queries, LEVELS=levels, TERMS=len(problems), GROUPS=problems[0].queries.shape[0],
        N_INFO=n_info, N_KL=n_kl, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        **({} if stats else {"BLOCK_D": tile.block_d or width}),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return partials


def _values(problem: Problem, infos: Tensor, kls: Tensor) -> Tensor:
    """loss, info, kl [3]."""
    kl = kls.mean()
    if problem.tau_info is None:
        return torch.stack([kl, torch.zeros_like(kl), kl])
    info = infos.mean()
    return torch.stack([info + problem.alpha * kl, info, kl])


def relational_losses(
    terms: Sequence[Term], tau_info: float, tau_kl: float, with_gradient: bool, launch: str
) -> tuple[Tensor, Tensor]:
    """Values and gradients of `ops.relational_losses`.

    Args:
        terms: operands as of `relational_loss` and `relation_kl`, one device and D, levels first.
        tau_info: at least `tiles.MIN_TAU`.
        tau_kl: at least `tiles.MIN_TAU`.
        with_gradient: False skips the second pass.
        launch: "scheduled" (one launch a pass), "separate", or "auto": as `tiles.SCHEDULED` says.
    Returns:
        [terms, 3] float32 `loss, info, kl`, and the gradients [R, D] float32 of all queries, one after the other.

    Note:
        Operands fp16, logits, sums and gradients fp32, bitwise repeatable.
    """
    first = terms[0].query
    sizes = [n for t in terms for n in [t.query.shape[0]] * (1 if t.query_permuted is None else 2)]
    with runtime.on_device(first.device):
        problems = problems_of(terms, tau_info, tau_kl)
        wanted = launch == "scheduled" or (launch == "auto" and tiles.SCHEDULED[runtime.architecture(first.device)])
        together = wanted and can_schedule(problems)
        shape = (sum(sizes) if with_gradient else 0, first.shape[1])
        gradients = torch.empty(shape, dtype=torch.float32, device=first.device)
        views = list(gradients.split(sizes)) if with_gradient else []
        groups = [list(range(len(problems)))] if together else [[i] for i in range(len(problems))]
        values = []
        for group in groups:
            mine = [problems[i] for i in group]
            stats = launch_all(mine, "stats") if together else [mine[0].launch("stats")]
            rows = [p.row_terms(partials) for p, partials in zip(mine, stats)]
            values += [_values(p, infos, kls) for p, (infos, kls, _) in zip(mine, rows)]
            if not with_gradient:
                continue
            coefficients = [c for _, _, c in rows]
            alone = not together
            partials = (
                [mine[0].launch("gradient", (coefficients[0],))]
                if alone
                else launch_all(mine, "gradient", coefficients)
            )
            for p, part, c in zip(mine, partials, coefficients):
                p.reduce(part, c, [views.pop(0) for _ in p.originals])
    return torch.stack(values), gradients
