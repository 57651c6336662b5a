"""Triton backend of `enqueue_` as a custom operator."""

import torch
from torch import Tensor

from rcmstr_fast.ops import triton_backend


@torch.library.custom_op("rcmstr_fast::enqueue_", mutates_args=("queue", "pointer"))
def _enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    from rcmstr_fast.kernels.enqueue import enqueue_

    enqueue_(queue, pointer, keys)


@_enqueue_.register_fake
def _(queue, pointer, keys):
    return None


def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """The public operation on the kernel."""
    _enqueue_(queue, pointer, keys.detach())


def reasons(queue: Tensor, pointer: Tensor, keys: Tensor) -> list[str]:
    """Why the kernel cannot run the call."""
    found = triton_backend.operand_reasons({"queue": queue, "keys": keys})
    found += [] if queue.is_contiguous() else ["queue must be contiguous"]
    return found + ([f"D must be at most 4096, got {queue.shape[1]}"] if queue.shape[1] > 4096 else [])
