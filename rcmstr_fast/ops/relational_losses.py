"""All relational loss terms of a step in one call: levels and relations between levels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.ops import checks, reference, triton_backend
from rcmstr_fast.ops.dispatch import operation, register
from rcmstr_fast.ops.queue_losses import implementation_of, result_dtype, triton_reasons
from rcmstr_fast.ops.reference import LossTerm, RelationalLoss
from rcmstr_fast.ops.relation_kl import check_relation_kl
from rcmstr_fast.ops.relational_loss import check_relational_loss

LAUNCHES = ("auto", "scheduled", "separate")
_NAME = "relational_losses"
_relational_losses = operation(_NAME, reference.relational_losses)

#: Flags of a term in the flat form that the custom operator takes.
_PERMUTED, _KL_ONLY, _QUERY_ROWS, _KEY_ROWS = 1, 2, 4, 8


def _flatten(terms: Sequence[LossTerm]) -> tuple[list[Tensor], list[Tensor], list[int], list[float]]:
    """Queries (they get gradients), constants, flags and alphas of the terms."""
    queries, constants, flags = [], [], []
    for term in terms:
        queries += [q for q in (term.query, term.query_permuted) if q is not None]
        constants += [c for c in (term.key, term.queue, term.query_rows, term.key_rows) if c is not None]
        flags.append(
            _PERMUTED * (term.query_permuted is not None)
            + _KL_ONLY * term.kl_only
            + _QUERY_ROWS * (term.query_rows is not None)
            + _KEY_ROWS * (term.key_rows is not None)
        )
    return queries, [c.detach() for c in constants], flags, [float(term.alpha) for term in terms]


def _terms(queries: list[Tensor], constants: list[Tensor], flags: list[int], alphas: list[float]) -> list[LossTerm]:
    """The inverse of `_flatten`."""
    query, constant = iter(queries), iter(constants)
    made = []
    for flag, alpha in zip(flags, alphas):
        rows, permuted = next(query), next(query) if flag & _PERMUTED else None
        key, queue = next(constant), next(constant)
        query_rows = next(constant) if flag & _QUERY_ROWS else None
        key_rows = next(constant) if flag & _KEY_ROWS else None
        made.append(LossTerm(rows, key, queue, permuted, alpha, bool(flag & _KL_ONLY), query_rows, key_rows))
    return made


@torch.library.custom_op("rcmstr_fast::relational_losses", mutates_args=())
def _losses(
    queries: list[Tensor],
    constants: list[Tensor],
    flags: list[int],
    alphas: list[float],
    tau_info: float,
    tau_kl: float,
    with_gradient: bool,
    launch: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`loss, info, kl` [terms, 3] and the gradients of each loss in its queries, one below the other [R, D]."""
    run = implementation_of(_NAME, backend).relational_losses
    with torch.no_grad(), torch.autocast(queries[0].device.type, enabled=False):
        terms = _terms(queries, constants, flags, alphas)
        return run(terms, tau_info, tau_kl, with_gradient, launch)


@_losses.register_fake
def _(queries, constants, flags, alphas, tau_info, tau_kl, with_gradient, launch, backend):  # type: ignore[no-untyped-def]
    first = queries[0]
    dtype = result_dtype(first)
    rows = sum(q.shape[0] for q in queries) if with_gradient else 0
    return first.new_empty(len(flags), 3, dtype=dtype), first.new_empty(rows, first.shape[1], dtype=dtype)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    queries, constants, ctx.flags = inputs[:3]
    ctx.queries = [(q.shape[0], q.dtype) for q in queries]
    ctx.constants = len(constants)
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_values: Tensor, _: Tensor | None) -> tuple:
    (gradients,) = ctx.saved_tensors
    term_of = [t for t, flag in enumerate(ctx.flags) for _ in range(2 if flag & _PERMUTED else 1)]
    parts = gradients.split([rows for rows, _ in ctx.queries])
    grads = [(part * grad_values[term, 0]).to(dtype) for part, term, (_, dtype) in zip(parts, term_of, ctx.queries)]
    return grads, [None] * ctx.constants, *[None] * 7


_losses.register_autograd(_backward, setup_context=_setup)


def _launch(asked: str) -> str:
    return (env.loss_launch() or asked) if asked == "auto" else asked


def _on(backend: str) -> Callable[..., list[RelationalLoss]]:
    def run(terms: Sequence[LossTerm], *, tau_info: float, tau_kl: float, launch: str) -> list[RelationalLoss]:
        queries, constants, flags, alphas = _flatten(terms)
        wanted = torch.is_grad_enabled() and any(q.requires_grad for q in queries)
        values, _ = _losses(queries, constants, flags, alphas, tau_info, tau_kl, wanted, _launch(launch), backend)
        logged = values.detach()
        return [RelationalLoss(values[i, 0], logged[i, 1], logged[i, 2]) for i in range(len(flags))]

    return run


def _reasons(terms: Sequence[LossTerm], *, tau_info: float, tau_kl: float, launch: str) -> list[str]:
    found: list[str] = []
    for term in terms:
        given = {"query_permuted": term.query_permuted, "tau_info": tau_info, "tau_kl": tau_kl}
        found += [r for r in triton_reasons(term.query, term.key, term.queue, **given) if r not in found]
    return found


register(
    _relational_losses,
    "triton",
    _on("triton"),
    unsupported_reasons=_reasons,
    available=triton_backend.reasons,
    avoid=triton_backend.avoid_on_cpu,
)
register(_relational_losses, "chunked", _on("chunked"))


def relational_losses(
    terms: Sequence[LossTerm],
    *,
    tau_info: float = 0.07,
    tau_kl: float = 0.04,
    launch: str = "auto",
    backend: str | None = None,
) -> list[RelationalLoss]:
    """Losses of several terms over queues: the levels of a step (paper Eq. 4) and its relations between levels (Eq. 6).

    A level gives what `relational_loss` gives, a term with `kl_only` what `relation_kl` gives; on a GPU all terms can
    share one launch a pass.

    Args:
        terms: at least one `LossTerm`, on one device.
        tau_info: above 0; temperature of InfoNCE.
        tau_kl: above 0; temperature of the KL.
        launch: "auto" (RCMSTR_FAST_LOSS_LAUNCH, else as measured: `kernels.tiles.SCHEDULED`), "scheduled" (one launch a
            pass where D is 64 or 128, levels come first and have as many queries each; only "triton" knows it) or
            "separate".
        backend: None (automatic), "reference", "chunked" or "triton".
    Returns:
        A term: `RelationalLoss(loss, info, kl)`, 0-d float32 (float64 for float64 queries); only `loss` carries a
        gradient, to query and query_permuted. NaN in any argument of a term gives NaN in that term.
    Raises:
        TypeError: an argument of a term is of another type.
        ValueError: there is no term, a term's shapes or devices disagree, `launch` is unknown.
    """
    if not terms:
        raise ValueError(f"{_NAME}: terms must hold at least one LossTerm, got none")
    checks.check_choice(_NAME, "launch", launch, LAUNCHES)
    for i, term in enumerate(terms):
        name = f"{_NAME}: term {i}"
        if term.kl_only:
            if term.query_permuted is not None:
                raise ValueError(f"{name}: query_permuted must be None with kl_only, got a tensor")
            check_relation_kl(name, term.query, term.key, term.queue, tau_kl, term.query_rows, term.key_rows)
        else:
            if term.query_rows is not None or term.key_rows is not None:
                raise ValueError(f"{name}: query_rows and key_rows must be None without kl_only, got a tensor")
            check_relational_loss(name, term.query, term.key, term.queue, term.query_permuted, tau_info, tau_kl)
    widths = {term.query.shape[1] for term in terms}
    if len(widths) > 1:
        raise ValueError(f"{_NAME}: all terms must have one D, got {' and '.join(map(str, sorted(widths)))}")
    devices = {str(term.query.device) for term in terms}
    if len(devices) > 1:
        raise ValueError(f"{_NAME}: all terms must be on one device, got {' and '.join(sorted(devices))}")
    return _relational_losses(terms, tau_info=tau_info, tau_kl=tau_kl, launch=launch, backend=backend)
