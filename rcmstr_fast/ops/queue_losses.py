"""The queue losses that never hold M x K, as custom operators: value and gradient in one forward.

The gradient is taken with the value, so the queue may be overwritten before backward, which only
multiplies by grad_output on the device. Backends: "chunked" (plain PyTorch, `ops.chunked`) and "triton"
(`kernels.relational_loss`), with one calling convention.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.kernels import tiles
from rcmstr_fast.ops import triton_backend
from rcmstr_fast.ops.dispatch import Operation, register
from rcmstr_fast.ops.reference import RelationalLoss

_MODULES = {"chunked": "rcmstr_fast.ops.chunked", "triton": "rcmstr_fast.kernels.relational_loss"}


def implementation_of(name: str, backend: str) -> ModuleType:
    """The module that runs operation `name` on "chunked" or "triton"."""
    module = (
        "rcmstr_fast.kernels.loss_terms" if (name, backend) == ("relational_losses", "triton") else _MODULES[backend]
    )
    return import_module(module)  # at the first call: triton is heavy, and absent on many machines


def result_dtype(query: Tensor) -> torch.dtype:
    """float32, float64 for float64 queries."""
    return torch.promote_types(query.dtype, torch.float32)


def _scale_of(grad_output: Tensor | None, gradient: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if grad_output is None else (gradient * grad_output).to(dtype)


@torch.library.custom_op("rcmstr_fast::relational_loss", mutates_args=())
def _relational_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    query_permuted: Tensor | None,
    tau_info: float,
    tau_kl: float,
    alpha: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`loss, info, kl` and the gradients of the loss in query and query_permuted ([0] where there is none)."""
    run = implementation_of("relational_loss", backend).relational_loss
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        loss, info, kl, gradients = run(query, key, queue, query_permuted, tau_info, tau_kl, alpha, with_gradient)
    gradients += [query.new_empty(0, dtype=loss.dtype) for _ in range(2 - len(gradients))]
    return loss, info, kl, gradients[0], gradients[1]


@_relational_loss.register_fake
def _(query, key, queue, query_permuted, tau_info, tau_kl, alpha, with_gradient, backend):  # type: ignore[no-untyped-def]
    dtype = result_dtype(query)
    loss, info, kl = (query.new_empty((), dtype=dtype) for _ in range(3))
    present = (with_gradient, with_gradient and query_permuted is not None)
    first, second = (query.new_empty(query.shape if there else (0,), dtype=dtype) for there in present)
    return loss, info, kl, first, second


def _relational_loss_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.dtypes = [None if rows is None else rows.dtype for rows in (inputs[0], inputs[3])]
    ctx.save_for_backward(output[3], output[4])


def _relational_loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple:
    grads = [
        None if dtype is None or not gradient.numel() else _scale_of(grad_loss, gradient, dtype)
        for dtype, gradient in zip(ctx.dtypes, ctx.saved_tensors)
    ]
    return grads[0], None, None, grads[1], None, None, None, None, None


_relational_loss.register_autograd(_relational_loss_backward, setup_context=_relational_loss_setup)


@torch.library.custom_op("rcmstr_fast::relation_kl", mutates_args=())
def _relation_kl(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    tau: float,
    query_rows: Tensor | None,
    key_rows: Tensor | None,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The KL and its gradient in query ([0] where there is none)."""
    run = implementation_of("relation_kl", backend).relation_kl
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        kl, gradient = run(query, key, queue, tau, query_rows, key_rows, with_gradient)
    return kl, query.new_empty(0, dtype=kl.dtype) if gradient is None else gradient


@_relation_kl.register_fake
def _(query, key, queue, tau, query_rows, key_rows, with_gradient, backend):  # type: ignore[no-untyped-def]
    dtype = result_dtype(query)
    return query.new_empty((), dtype=dtype), query.new_empty(query.shape if with_gradient else (0,), dtype=dtype)


def _relation_kl_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _relation_kl_backward(ctx: Any, grad_kl: Tensor | None, _: Tensor | None) -> tuple:
    return _scale_of(grad_kl, ctx.saved_tensors[0], ctx.dtype), None, None, None, None, None, None, None


_relation_kl.register_autograd(_relation_kl_backward, setup_context=_relation_kl_setup)


def _relational_loss_on(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    query_permuted: Tensor | None,
    tau_info: float,
    tau_kl: float,
    alpha: float,
    implementation: str,
) -> RelationalLoss:
    wanted = query.requires_grad or (query_permuted is not None and query_permuted.requires_grad)
    loss, info, kl, _, _ = _relational_loss(
        query, key.detach(), queue.detach(), query_permuted, tau_info, tau_kl, alpha,
        wanted and torch.is_grad_enabled(), implementation,
    )  # fmt: skip
    return RelationalLoss(loss, info.detach(), kl.detach())


def _relation_kl_on(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    tau: float,
    query_rows: Tensor | None,
    key_rows: Tensor | None,
    implementation: str,
) -> Tensor:
    wanted = query.requires_grad and torch.is_grad_enabled()
    return _relation_kl(query, key.detach(), queue.detach(), tau, query_rows, key_rows, wanted, implementation)[0]


def triton_reasons(query: Tensor, key: Tensor, queue: Tensor, **options: Any) -> list[str]:
    """Why the kernels cannot run a term."""
    operands = {"query": query, "key": key, "queue": queue, "query_permuted": options.get("query_permuted")}
    reasons = triton_backend.operand_reasons(operands)
    if query.shape[1] not in tiles.WIDTHS:
        reasons.append(f"D must be one of {', '.join(map(str, tiles.WIDTHS))}, got {query.shape[1]}")
    temperatures = {name: value for name, value in options.items() if name.startswith("tau")}
    for name, value in temperatures.items():
        if value < tiles.MIN_TAU:
            reasons.append(f"{name} must be at least {tiles.MIN_TAU}, got {value}")
    return reasons


def register_queue_loss(op: Operation) -> None:
    """Register the Triton and the chunked backend of `relational_loss` or `relation_kl`."""
    run: Callable[..., Any] = _relational_loss_on if op.name == "relational_loss" else _relation_kl_on
    register(
        op,
        "triton",
        functools.partial(run, implementation="triton"),
        unsupported_reasons=triton_reasons,
        available=triton_backend.reasons,
        avoid=triton_backend.avoid_on_cpu,
    )
    register(op, "chunked", functools.partial(run, implementation="chunked"))
