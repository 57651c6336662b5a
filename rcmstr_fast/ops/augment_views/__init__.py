"""Random views of a batch of images: contract, checks and the backends of `augment_views`."""

import torch
from torch import Tensor

from rcmstr_fast import env, random
from rcmstr_fast.ops import checks, dispatch, permutation
from rcmstr_fast.ops.augment_views import compiled, cpu, cuda, parameters, reference
from rcmstr_fast.ops.augment_views.presets import OPERATIONS, PRESETS, AugmentPreset, PresetLike, load_preset, views_of

__all__ = ["OPERATIONS", "PRESETS", "AugmentPreset", "augment_views", "each_operation", "load_preset"]

_OPERATION = dispatch.operation("augment_views", reference.augment_views)
#: Streams below 65,536 are left for this many views.
_MAX_VIEWS = 65536 - random.AUGMENT


def augment_views(
    images_uint8: Tensor,
    *,
    seed: int,
    epoch: int,
    index: Tensor,
    num_views: int,
    size: tuple[int, int],
    preset: PresetLike = "pretrain",
    order: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Random views of every image, a pure function of (seed, epoch, index, view).

    A view does not depend on the other images of the batch, on the number of threads, or on earlier calls.

    Args:
        images_uint8: [B, H, W, 3] uint8, RGB, on any device; already at `size`.
        seed: 64-bit key of the run.
        epoch: in [0, 2^32).
        index: [B] int64 in [0, 2^48), on any device; the slots of the images in the epoch.
        num_views: V, 1 or more.
        size: (height, width) of the views.
        preset: what the views are made of: a name out of `PRESETS`, an `AugmentPreset`, or a sequence of V of them,
            one a view. `ibot` is two presets and makes two views.
        order: [B, N] int64 on the device of the images, as from `draw_order`; view 0 is also written with its strips
            in this order, as `permute_strips` shows them. None: without.
        dtype: float32 or bfloat16.
        backend: `cuda`, `cpp` or `reference`; None: the first that can.
    Returns:
        [V, B, 3, H, W] of dtype, (x / 255 - 0.5) / 0.5; each view in channels_last memory; with `order`
        [V + 1, B, 3, H, W], the permuted view 0 last. Backends agree to one grey level (2 / 255), except for pixels
        at the threshold of solarise.
    Raises:
        TypeError: an argument of another dtype or type.
        ValueError: an argument of another shape or out of range.
        BackendError: the ordered backend cannot run this call.
    """
    _check(images_uint8, seed, epoch, index, num_views, size)
    try:
        of_view = views_of(preset, num_views)
    except (TypeError, ValueError) as error:
        raise type(error)(f"augment_views: {error}") from None
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"augment_views: dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if order is not None:
        _check_order(images_uint8, order)
    return _OPERATION(
        images_uint8,
        seed=seed,
        epoch=epoch,
        index=index,
        num_views=num_views,
        size=size,
        preset=of_view,
        order=order,
        dtype=dtype,
        backend=backend,
    )


def each_operation(
    images_uint8: Tensor,
    *,
    seed: int,
    epoch: int,
    index: Tensor,
    view: int = 0,
    preset: str | AugmentPreset = "pretrain",
) -> dict[str, Tensor]:
    """Every operation of a preset alone, with the parameters that `augment_views` draws for a view (slow).

    Args:
        images_uint8: [B, H, W, 3] uint8.
        seed, epoch, index: as for `augment_views`.
        view: whose parameters.
        preset: name or preset of that view.
    Returns:
        name of the operation -> [B, 3, H, W] float32 on the CPU, (x / 255 - 0.5) / 0.5.
    """
    height, width = images_uint8.shape[1:3]
    _check(images_uint8, seed, epoch, index, view + 1, (height, width))
    images, index = images_uint8.cpu(), index.cpu()
    (of_view,) = views_of(preset, 1)
    rows = parameters.draw_parameters(index, seed=seed, epoch=epoch, view=view, preset=of_view)
    return {name: reference.apply_parameters(images, parameters.only(rows, name)[None])[0] for name in of_view.names}


def _check(images: Tensor, seed: int, epoch: int, index: Tensor, num_views: int, size: tuple[int, int]) -> None:
    for name, tensor, dtype in (("images_uint8", images, torch.uint8), ("index", index, torch.int64)):
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            raise TypeError(f"augment_views: {name} must be a tensor of {dtype}, got {_kind(tensor)}")
    for name, number in (("seed", seed), ("epoch", epoch), ("num_views", num_views)):
        if not isinstance(number, int):
            raise TypeError(f"augment_views: {name} must be an int, got {_kind(number)}")
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"augment_views: size must be (height, width), got {size!r}")
    height, width = size
    if images.dim() != 4 or images.shape[1:] != (height, width, 3) or min(height, width) < 1:
        raise ValueError(f"augment_views: images_uint8 must be [B, {height}, {width}, 3], got {list(images.shape)}")
    if index.shape != images.shape[:1]:
        raise ValueError(f"augment_views: index must be [{len(images)}] like the images, got {list(index.shape)}")
    if not 0 <= epoch < 1 << 32:
        raise ValueError(f"augment_views: epoch must be in [0, 2^32), got {epoch}")
    if not 1 <= num_views <= _MAX_VIEWS:
        raise ValueError(f"augment_views: num_views must be in [1, {_MAX_VIEWS}], got {num_views}")
    _check_index(index)


def _check_index(index: Tensor) -> None:
    """Look at the values where that waits for no device, and in debugging."""
    if len(index) and (index.device.type == "cpu" or env.debug()):
        low, high = index.min().item(), index.max().item()
        if low < 0 or high >= 1 << 48:
            raise ValueError(f"augment_views: index must be in [0, 2^48), got {low} to {high}")


def _check_order(images: Tensor, order: Tensor) -> None:
    checks.check_tensor("augment_views", "order", order, (len(images), "N"), "int64", like="images_uint8")
    checks.check_divides("augment_views", "order.shape[1]", order.shape[1], "the width", images.shape[2])
    checks.check_devices("augment_views", images_uint8=images, order=order)
    if order.device.type == "cpu" or env.debug():
        permutation.check_order("augment_views", order, max(1, len(images)))


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


dispatch.register(_OPERATION, "cpp", cpu.run, unsupported_reasons=cpu.unsupported_reasons, available=compiled.missing)
dispatch.register(_OPERATION, "cuda", cuda.run, unsupported_reasons=cuda.unsupported_reasons, available=cuda.missing)
