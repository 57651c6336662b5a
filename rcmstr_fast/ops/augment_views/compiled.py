"""`augment_views` by the compiled module: what its host and its CUDA functions share. Tensors are passed as addresses."""

from itertools import groupby

import torch
from torch import Tensor

from rcmstr_fast import env, random
from rcmstr_fast.ops import native
from rcmstr_fast.ops.augment_views.parameters import ROW, table
from rcmstr_fast.ops.augment_views.presets import AugmentPreset

_U64 = (1 << 64) - 1


def missing() -> list[str]:
    """Why the compiled module cannot be used."""
    if native.extension is None:
        return ["the compiled module rcmstr_fast._C is missing (`pip install -e .` builds it)"]
    return [] if native.has("augment_draw") else ["rcmstr_fast._C is older than this package (build it again)"]


def draw(index: Tensor, seed: int, epoch: int, presets: tuple[AugmentPreset, ...]) -> Tensor:
    """Rows of parameters [V, B, ROW], one preset a view, drawn on the device of `index` [B] int64."""
    index = index.contiguous()
    rows = torch.empty((len(presets), len(index), ROW), device=index.device)
    first = 0
    for preset, run in groupby(presets):
        views = len(list(run))
        args = (index.data_ptr(), rows[first].data_ptr(), views, len(index), seed & _U64, epoch, random.AUGMENT + first)
        numbers = table(preset)  # held: two threads that ask first at once get two, of which the cache keeps one
        if index.is_cuda:
            native.extension.augment_draw_cuda(*args, numbers.data_ptr(), torch.cuda.current_stream().cuda_stream)
        else:
            native.extension.augment_draw(*args, numbers.data_ptr(), env.threads())
        first += views
    return rows


def places(order: Tensor) -> Tensor:
    """[B, N] places that show each strip: the inverse of `order`, on its device."""
    strips = torch.arange(order.numel(), device=order.device)
    return torch.full_like(strips, -1).scatter_(0, order.flatten(), strips)


def apply(images: Tensor, rows: Tensor, order: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """[V, B, 3, H, W] views with the parameters rows [V, B, ROW] on the same device; with `order` one more."""
    images, rows = images.contiguous(), rows.contiguous()
    where, patches = (None, 0) if order is None else (places(order), order.shape[1])
    written = len(rows) + (order is not None)
    views = torch.empty((written, *images.shape), dtype=dtype, device=images.device)
    addresses = (images.data_ptr(), rows.data_ptr(), views.data_ptr())
    to = (dtype == torch.bfloat16, 0 if where is None else where.data_ptr(), patches)
    args = (*addresses, len(rows), *images.shape[:3], *to)
    if images.is_cuda:
        native.extension.augment_views_cuda(*args, torch.cuda.current_stream().cuda_stream)
    else:
        native.extension.augment_views(*args, env.threads())
    return views.permute(0, 1, 4, 2, 3)
