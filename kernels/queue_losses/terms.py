"""Launchers of all loss terms of a step: each pass over the queues in one launch, or one launch a term.

Both ways share the operands in fp16 (a queue or a key that two terms use is converted once), the row-wise kernels and
the layout of partial results. In one launch the partial gradients of all terms exist at the same time, within
`tiles.WORKSPACE_BYTES`, and `tiles.schedule` cuts the queues. Nothing synchronises.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from rcmstr_fast.kernels import runtime
from rcmstr_fast.kernels.queue_losses import scheduled, similarity, tiles
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


def can_schedule(problems: Sequence[Problem], kind: str) -> bool:
    """Whether one launch of a pass can hold the terms: levels before pairs, as many queries in each level."""
    levels = [p for p in problems if p.tau_info is not None]
    family = runtime.architecture(problems[0].queries.device)
    return (
        family in tiles.SCHEDULED.get((kind, problems[0].width), ())
        and bool(levels)
        and all(p.tau_info is not None for p in problems[: len(levels)])
        and len({p.queries.shape[0] for p in levels}) == 1
    )


class _Plan(NamedTuple):
    """How the programs of one launch divide among terms: an entry for each term.

    Attributes:
        firsts: first program, then the number of all programs.
        part_sizes: queue rows of a part.
        parts: parts of the queue.
    """

    firsts: list[int]
    part_sizes: list[int]
    parts: list[int]


def _plan(problems: Sequence[Problem], kind: str) -> _Plan:
    """Cut the queues so that all terms together keep the device busy (`tiles.schedule`)."""
    tile, width = problems[0].tile(kind), problems[0].width
    programs = [triton.cdiv(p.rows, tile.block_m) * p.layers(tile, kind) for p in problems]
    # A step multiplies by the key and by each query once; for a gradient also by the queue, for each slice of columns.
    products = 1 if kind == "stats" else 1 + (tile.block_d or width) / width
    work = tuple(
        tiles.Work(
            count,
            triton.cdiv(p.queue.shape[0], tile.block_n),
            1 + min(tile.queries, p.queries.shape[0]) * products,
            4 * p.queries.shape[0] * math.prod(p.partials_of(kind)),
        )
        for p, count in zip(problems, programs)
    )
    wanted = tiles.schedule(work, runtime.multiprocessors(problems[0].queries.device) * tile.resident)
    sizes = [triton.cdiv(w.key_tiles, n) * tile.block_n for w, n in zip(work, wanted)]
    parts = [triton.cdiv(p.queue.shape[0], size) for p, size in zip(problems, sizes)]
    firsts = list(accumulate((count * n for count, n in zip(programs, parts)), initial=0))
    return _Plan(firsts, sizes, parts)


def launch_all(problems: Sequence[Problem], kind: str, coefficients: Sequence[Tensor] = ()) -> list[Tensor]:
    """The "stats" or "gradient" pass of all terms in one launch; partials of each as of `Problem.launch`."""
    first, plan = problems[0], _plan(problems, kind)
    tile, levels = first.tile(kind), sum(p.tau_info is not None for p in problems)
    between = problems[levels:]
    partials = [
        torch.empty((n, p.queries.shape[0], *p.partials_of(kind)), dtype=torch.float32, device=p.queries.device)
        for p, n in zip(problems, plan.parts)
    ]
    # One form for all terms: steps are whole only if they are in every queue.
    rows = math.gcd(*(p.queue.shape[0] for p in problems))
    form = similarity.form(tile, first.width, True, first.powers, rows)
    stats = kind == "stats"
    kernel = scheduled._scheduled_stats_kernel if stats else scheduled._scheduled_gradient_kernel
    kernel[(plan.firsts[-1],)](
        tuple(tuple(p.operands[i] for p in problems) for i in range(3)),
        tuple(tuple(p.operands[i] for p in between) for i in (3, 4)),
        *(() if stats else (tuple(coefficients),)),
        tuple(partials),
        tuple(plan.firsts[:-1]),
        tuple(zip(*(p.sizes for p in problems))),
        tuple(plan.part_sizes),
        first.scales,
        LEVELS=levels,
        GROUPS=first.queries.shape[0],
        FORM=form,
        PAIRS=scheduled.pairs_form(form),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return partials


def _launches(
    problems: Sequence[Problem], kind: str, launch: str, coefficients: Sequence[Tensor] = ()
) -> Iterator[Tensor]:
    """Partials of each term, all in one launch where that can be; else each launched when it is asked for."""
    if launch != "separate" and can_schedule(problems, kind):
        yield from launch_all(problems, kind, coefficients)
    else:
        of_terms: list[tuple[Tensor, ...]] = [(c,) for c in coefficients] or [()] * len(problems)
        yield from (p.launch(kind, mine) for p, mine in zip(problems, of_terms))


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
        launch: "separate", or anything else: all terms of a pass in one launch where that can be (`can_schedule`).
    Returns:
        [terms, 3] float32 `loss, info, kl`, and the gradients [R, D] float32 of all queries, one after the other.

    Note:
        Operands fp16, logits, sums and gradients fp32, bitwise repeatable.
    """
    query = terms[0].query
    sizes = [n for t in terms for n in [t.query.shape[0]] * (1 if t.query_permuted is None else 2)]
    with runtime.on_device(query.device):
        problems = problems_of(terms, tau_info, tau_kl)
        shape = (sum(sizes) if with_gradient else 0, query.shape[1])
        gradients = torch.empty(shape, dtype=torch.float32, device=query.device)
        rows = [p.row_terms(partials) for p, partials in zip(problems, _launches(problems, "stats", launch))]
        values = torch.stack([_values(p, infos, kls) for p, (infos, kls, _) in zip(problems, rows)])
        if with_gradient:
            views, coefficients = iter(gradients.split(sizes)), [c for _, _, c in rows]
            passes = _launches(problems, "gradient", launch, coefficients)
            for p, partials, c in zip(problems, passes, coefficients):
                p.reduce(partials, c, [next(views) for _ in p.originals])
    return values, gradients
