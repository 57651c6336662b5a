"""Shuffling vertical strips inside groups of images, and putting the frames back, in plain PyTorch."""

import torch
from torch import Tensor

from rcmstr_fast import random


def permute_strips(images: Tensor, order: Tensor, *, num_patches: int, group_size: int) -> Tensor:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.permute_strips`."""
    strips = images.unflatten(3, (num_patches, -1))
    shown = strips[order // num_patches, :, :, order % num_patches]  # [B, N, C, H, W / N]
    layout = torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return shown.permute(0, 2, 3, 1, 4).flatten(3).contiguous(memory_format=layout)


def restore_frames(frames: Tensor, order: Tensor, *, num_patches: int, group_size: int) -> Tensor:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.restore_frames`."""
    strips = frames.unflatten(1, (num_patches, -1)).flatten(0, 1)
    place = torch.argsort(order.flatten())  # where each strip is shown
    return strips.index_select(0, place).reshape(frames.shape)


def draw_order(
    index: Tensor, *, seed: int, epoch: int | Tensor, num_patches: int, group_size: int, shared: bool = False
) -> Tensor:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.draw_order`."""
    strips = num_patches * group_size
    full = index.numel() // group_size * group_size
    first = index[:1].expand(full // group_size) if shared else index[:full:group_size]
    words = random.words(first, strips, seed=seed, stream=random.PERMUTATION, epoch=epoch)
    order = torch.arange(index.numel() * num_patches, device=index.device)
    base = order[: full * num_patches : strips, None]
    order[: full * num_patches] = (base + random.permutation(words)).flatten()
    return order.view(-1, num_patches)
