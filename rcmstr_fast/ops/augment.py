"""Random views of a batch of images: checks, and the backends of `augment_views`."""

from typing import Any

import torch
from torch import Tensor

from rcmstr_fast import env, random
from rcmstr_fast.ops import checks, dispatch, permutation
from rcmstr_fast.ops.reference import augment as reference

try:
    from rcmstr_fast import _C  # type: ignore[attr-defined]
except ImportError:
    _C = None

_OPERATION = dispatch.operation("augment_views", reference.augment_views)
#: Streams below 65,536 are left for this many views.
_MAX_VIEWS = 65536 - random.AUGMENT
_U64 = (1 << 64) - 1


def augment_views(
    images_uint8: Tensor, *, seed: int, epoch: int, index: Tensor, num_views: int, size: tuple[int, int],
    preset: str = "pretrain", order: Tensor | None = None, dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Random views of every image (SPEC section 7), a pure function of (seed, epoch, index, view).

    A view does not depend on the other images of the batch, on the number of threads, or on earlier calls.

    Args:
        images_uint8: [B, H, W, 3] uint8, RGB, on any device; already at `size`.
        seed: 64-bit key of the run.
        epoch: in [0, 2^32).
        index: [B] int64 in [0, 2^48), on any device; the slots of the images in the epoch.
        num_views: V, 1 or more.
        size: (height, width) of the views.
        preset: `pretrain` (1 to 5 of all seven operations), `light` (1 to 4 of contrast, blur and the two crops) or
            `none` (normalised only).
        order: [B, N] int64 on the device of the images, as from `draw_order`; view 0 is also written with its strips
            in this order, as `permute_strips` shows them. None: without.
        dtype: float32 or bfloat16.
        backend: `cuda`, `cpp` or `reference`; None: the first that can.
    Returns:
        [V, B, 3, H, W] of dtype, (x / 255 - 0.5) / 0.5; each view in channels_last memory; with `order`
        [V + 1, B, 3, H, W], the permuted view 0 last. Backends agree to one grey level (2 / 255).
    Raises:
        TypeError: an argument of another dtype or type.
        ValueError: an argument of another shape or out of range.
        BackendError: the ordered backend cannot run this call.
    """
    _check(images_uint8, seed, epoch, index, num_views, size, preset)
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"augment_views: dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if order is not None:
        _check_order(images_uint8, order)
    return _OPERATION(
        images_uint8, seed=seed, epoch=epoch, index=index, num_views=num_views, size=size, preset=preset, order=order,
        dtype=dtype, backend=backend,
    )  # fmt: skip


def each_operation(images_uint8: Tensor, *, seed: int, epoch: int, index: Tensor, view: int = 0) -> dict[str, Tensor]:
    """Every operation alone, with the parameters that `augment_views` draws for a view (contact sheets; slow).

    Args:
        images_uint8: [B, H, W, 3] uint8.
        seed, epoch, index: as for `augment_views`.
        view: whose parameters.
    Returns:
        name of the operation -> [B, 3, H, W] float32 on the CPU, (x / 255 - 0.5) / 0.5.
    """
    height, width = images_uint8.shape[1:3]
    _check(images_uint8, seed, epoch, index, view + 1, (height, width), "pretrain")
    images, index = images_uint8.cpu(), index.cpu()
    return {
        name: reference.augment_operation(images, name, seed=seed, epoch=epoch, index=index, view=view)
        for name in reference.OPERATIONS
    }


def _check(
    images: Tensor, seed: int, epoch: int, index: Tensor, num_views: int, size: tuple[int, int], preset: str
) -> None:
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
    if preset not in reference.PRESETS:
        raise ValueError(f"augment_views: preset must be one of {', '.join(reference.PRESETS)}, got {preset!r}")
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


def _draw(index: Tensor, seed: int, epoch: int, num_views: int, preset: str) -> Tensor:
    """[V, B, ROW] parameters, drawn by the compiled module on the device of `index`."""
    index = index.contiguous()
    rows = torch.empty((num_views, len(index), reference.ROW), device=index.device)
    stream = (random.AUGMENT, reference.PRESETS[preset])
    args = (index.data_ptr(), rows.data_ptr(), num_views, len(index), seed & _U64, epoch, *stream)
    if index.is_cuda:
        _C.augment_draw_cuda(*args, torch.cuda.current_stream().cuda_stream)
    else:
        _C.augment_draw(*args, env.threads())
    return rows


def _places(order: Tensor) -> Tensor:
    """[B, N] places that show each strip: the inverse of `order`, on its device."""
    strips = torch.arange(order.numel(), device=order.device)
    return torch.full_like(strips, -1).scatter_(0, order.flatten(), strips)


def _apply(images: Tensor, rows: Tensor, order: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """[V, B, 3, H, W] views with the parameters rows [V, B, ROW] on the same device, by the compiled module."""
    images, rows = images.contiguous(), rows.contiguous()
    places, patches = (None, 0) if order is None else (_places(order), order.shape[1])
    written = len(rows) + (order is not None)
    views = torch.empty((written, *images.shape), dtype=dtype, device=images.device)
    args = (
        images.data_ptr(), rows.data_ptr(), views.data_ptr(), len(rows), *images.shape[:3], dtype == torch.bfloat16,
        0 if places is None else places.data_ptr(), patches,
    )  # fmt: skip
    if images.is_cuda:
        _C.augment_views_cuda(*args, torch.cuda.current_stream().cuda_stream)
    else:
        _C.augment_views(*args, env.threads())
    return views.permute(0, 1, 4, 2, 3)


def _cpp(
    images: Tensor, *, seed: int, epoch: int, index: Tensor, num_views: int, size: tuple[int, int], preset: str,
    order: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _apply(images, _draw(index.cpu(), seed, epoch, num_views, preset), order, dtype)


def _cuda(
    images: Tensor, *, seed: int, epoch: int, index: Tensor, num_views: int, size: tuple[int, int], preset: str,
    order: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    with torch.cuda.device(images.device):
        index = index.to(images.device, non_blocking=True)
        return _apply(images, _draw(index, seed, epoch, num_views, preset), order, dtype)


def _built() -> list[str]:
    if _C is None:
        return ["the compiled module rcmstr_fast._C is missing (`pip install -e .` builds it)"]
    return [] if hasattr(_C, "augment_views") else ["rcmstr_fast._C is older than this package (build it again)"]


def _cuda_available() -> list[str]:
    if reasons := _built():
        return reasons
    if not _C.cuda:
        return ["rcmstr_fast._C was built without CUDA (no nvcc at build time)"]
    return [] if torch.cuda.is_available() else ["torch finds no CUDA device"]


def _on_cpu(images: Tensor, **_: Any) -> list[str]:
    return [] if images.device.type == "cpu" else [f"images_uint8 must be on the CPU, got {images.device}"]


def _on_cuda(images: Tensor, **_: Any) -> list[str]:
    if images.device.type != "cuda":
        return [f"images_uint8 must be on a CUDA device, got {images.device}"]
    need = 2 * 4 * images[:1].numel()
    limit = torch.cuda.get_device_properties(images.device).shared_memory_per_block_optin - 1024  # type: ignore[attr-defined]
    return [] if need <= limit else [f"a picture takes {need} bytes of shared memory, {images.device} has {limit}"]


dispatch.register(_OPERATION, "cpp", _cpp, unsupported_reasons=_on_cpu, available=_built)
dispatch.register(_OPERATION, "cuda", _cuda, unsupported_reasons=_on_cuda, available=_cuda_available)
