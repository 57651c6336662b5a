"""Ring-buffer write in plain PyTorch."""

import torch
from torch import Tensor


@torch.no_grad()
def enqueue_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.enqueue_`."""
    size, count = queue.shape[0], keys.shape[0]
    skipped = max(0, count - size)
    rows = (pointer + torch.arange(skipped, count, device=queue.device)) % size
    queue.index_copy_(0, rows, keys[skipped:].to(queue.dtype))
    pointer.add_(count).remainder_(size)
