"""Activation checkpointing: a part of a network keeps its inputs only and is computed again in backward."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rcmstr_fast.models.batch_norm import batch_norm_state, norms_of


def recomputed(part: nn.Module, *arguments: Any) -> Tensor:
    """`part(*arguments)` without keeping its activations.

    The second computation divides batch-norm statistics as the first did and leaves the running ones alone.

    Args:
        part: draws no random numbers.
        arguments: of its forward.
    """
    norms = norms_of(part)
    passes = norms[0].passes if norms else 1

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), batch_norm_state(norms, passes=passes, tracking=False)

    return checkpoint(
        part, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )  # fmt: skip


def run_part(part: nn.Module, *arguments: Any, recompute: bool) -> Tensor:
    """`part(*arguments)`, recomputed in backward where asked for and where there will be one."""
    if recompute and torch.is_grad_enabled():
        return recomputed(part, *arguments)
    return part(*arguments)
