"""`augment_views` on the CPU (csrc/augment.cpp): threads over views and images, off the interpreter lock."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops.augment_views import compiled
from rcmstr_fast.ops.augment_views.presets import AugmentPreset


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
    return compiled.apply(images, compiled.draw(index.cpu(), seed, epoch, preset), order, dtype)


def unsupported_reasons(images: Tensor, **_: Any) -> list[str]:
    """Why these images cannot be augmented here."""
    return [] if images.device.type == "cpu" else [f"images_uint8 must be on the CPU, got {images.device}"]
