"""The queue losses that never hold M x K, as one custom operator over a list of terms.

The operator computes values and gradients together in its forward. The queue may therefore be overwritten before
backward, which only multiplies the gradients by that of the loss, on the device. Two implementations have the same
calling convention: `chunked` (plain PyTorch and C++) and `kernels.queue_losses.terms` (Triton).
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.ops.queue_losses.reference import LossTerm, RelationalLoss
from rcmstr_fast.tuning import choices
from rcmstr_fast.tuning.choices import Choice

_MODULES = {"chunked": "rcmstr_fast.ops.queue_losses.chunked", "triton": "rcmstr_fast.kernels.queue_losses.terms"}

#: How the terms of a step are launched on a GPU. One launch a pass is the prior: by the model of `tiles.schedule` it keeps
#: the device busy above 93 % of the time, where separate launches of small terms leave half of it idle.
LAUNCH = choices.declare(
    Choice(
        "relational_losses.launch",
        "launches of the loss terms",
        "relational_losses",
        1.3,
        lambda setting: (
            ["scheduled", "separate"] if setting.calls.get("relational_losses", ())[:1] == ("triton",) else []
        ),
        lambda setting: "scheduled",
        lambda setting: "RCMSTR_FAST_LOSS_LAUNCH" if env.loss_launch() else "",
        verify=("relational_losses", "triton"),
    )
)

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


def _implementation(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    module = import_module(_MODULES[backend])  # at the first call: triton is heavy, and absent on many machines
    return module.relational_losses


def _result_dtype(query: Tensor) -> torch.dtype:
    """float32, float64 for float64 queries."""
    return torch.promote_types(query.dtype, torch.float32)


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
    run = _implementation(backend)
    with torch.no_grad(), torch.autocast(queries[0].device.type, enabled=False):
        terms = _terms(queries, constants, flags, alphas)
        return run(terms, tau_info, tau_kl, with_gradient, launch)


@_losses.register_fake
def _(queries, constants, flags, alphas, tau_info, tau_kl, with_gradient, launch, backend):
    first = queries[0]
    dtype = _result_dtype(first)
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


def losses_on(backend: str) -> Callable[..., list[RelationalLoss]]:
    """The public operation `relational_losses` on "chunked" or "triton"."""

    def run(terms: Sequence[LossTerm], *, tau_info: float, tau_kl: float, launch: str) -> list[RelationalLoss]:
        queries, constants, flags, alphas = _flatten(terms)
        wanted = torch.is_grad_enabled() and any(q.requires_grad for q in queries)
        if launch == "auto":
            launch = env.loss_launch() or choices.value(LAUNCH.name) or "scheduled"
        values, _ = _losses(queries, constants, flags, alphas, tau_info, tau_kl, wanted, launch, backend)
        logged = values.detach()
        return [RelationalLoss(values[i, 0], logged[i, 1], logged[i, 2]) for i in range(len(flags))]

    return run
