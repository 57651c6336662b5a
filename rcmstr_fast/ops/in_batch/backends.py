"""`info_nce` as one custom operator: the loss and both gradients in one forward, so M x K is formed only in parts.

Backward multiplies the gradients by grad_output on the device. The two implementations share one calling convention:
`(query, candidates, positive, skip or None, temperature, with_gradient) -> loss, grad_query, grad_candidates`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import triton_backend

_MODULES = {"chunked": "rcmstr_fast.ops.in_batch.chunked", "triton": "rcmstr_fast.kernels.in_batch"}

#: Widths D of the Triton kernels, and the temperature below which exp((s - 1) / t) of unit rows may vanish in float32.
WIDTHS = (64, 128, 256)
LEAST_TEMPERATURE = 0.025


@torch.library.custom_op("rcmstr_fast::info_nce", mutates_args=())
def _operator(
    query: Tensor,
    candidates: Tensor,
    positive: Tensor,
    skip: Tensor | None,
    temperature: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss 0-d and its gradients [M, D], [K, D] in the arithmetic's dtype (empty without)."""
    module = import_module(_MODULES[backend])  # at the first call: triton is heavy, and absent on many machines
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        return module.info_nce(query, candidates, positive, skip, temperature, with_gradient)


@_operator.register_fake
def _(query, candidates, positive, skip, temperature, with_gradient, backend):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(query.dtype, torch.float32)
    width = query.shape[1]
    rows, others = (query.shape[0], candidates.shape[0]) if with_gradient else (0, 0)
    return (
        query.new_empty((), dtype=dtype),
        query.new_empty((rows, width), dtype=dtype),
        query.new_empty((others, width), dtype=dtype),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple:
    gradients = [(x * grad).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes)]
    return *gradients, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup)


def on(backend: str) -> Callable[..., Tensor]:
    """The operation on the chunked or the Triton implementation."""

    def run(query: Tensor, candidates: Tensor, positive: Tensor, *, temperature: float, skip: Tensor | None) -> Tensor:
        wanted = torch.is_grad_enabled() and (query.requires_grad or candidates.requires_grad)
        return _operator(query, candidates, positive, skip, float(temperature), wanted, backend)[0]

    return run


def triton_reasons(
    query: Tensor, candidates: Tensor, positive: Tensor, *, temperature: float, skip: Tensor | None
) -> list[str]:
    """Why the kernels cannot run this call."""
    reasons = triton_backend.operand_reasons({"query": query, "candidates": candidates})
    if query.shape[1] not in WIDTHS:
        reasons.append(f"D must be one of {', '.join(map(str, WIDTHS))}, got {query.shape[1]}")
    if temperature < LEAST_TEMPERATURE:
        reasons.append(f"temperature must be at least {LEAST_TEMPERATURE}, got {temperature}")
    return reasons
