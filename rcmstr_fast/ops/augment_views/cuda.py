"""`augment_views` on a GPU (csrc/augment.cu): a block a view and image; nothing waits for the GPU."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import native
from rcmstr_fast.ops.augment_views import compiled
from rcmstr_fast.ops.augment_views.presets import AugmentPreset

#: Bytes of a block's shared memory beside the two pictures: row, prepared numbers, sums; and what CUDA keeps.
_BESIDE = 4096


def run(
    images: Tensor,
    *,
    seed: int,
    epoch: int,
    index: Tensor,
    num_views: int,
    size: tuple[int, int],
    preset: tuple[AugmentPreset, ...],
    order: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The checked arguments of `augment_views`."""
    with torch.cuda.device(images.device):
        index = index.to(images.device, non_blocking=True)
        return compiled.apply(images, compiled.draw(index, seed, epoch, preset), order, dtype)


def missing() -> list[str]:
    """Why this machine or build has no CUDA version."""
    return compiled.missing() or native.cuda_reasons()


def unsupported_reasons(images: Tensor, **_: Any) -> list[str]:
    """Why these images cannot be augmented here."""
    if images.device.type != "cuda":
        return [f"images_uint8 must be on a CUDA device, got {images.device}"]
    need = 2 * 4 * images[:1].numel()
    properties: Any = torch.cuda.get_device_properties(images.device)
    limit = properties.shared_memory_per_block_optin - _BESIDE
    return [] if need <= limit else [f"a picture takes {need} bytes of shared memory, {images.device} has {limit}"]
