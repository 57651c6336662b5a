"""The views of the presets `pretrain`, `light` and `none` out of NVIDIA DALI's operators, as far as DALI has them.

For comparison with `augment_views`, and for installations without the compiled module. Subset and parameters are
those that `augment_views` draws, but the operations come in one fixed order (contrast, blur, crops, perspective,
sharpen), there is no piecewise affine map, and the blur mirrors the picture at its border.
"""

import threading
from typing import Any

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali import fn, types
from torch import Tensor

from rcmstr_fast.fields import ConfigError
from rcmstr_fast.ops.augment_views import parameters as layout
from rcmstr_fast.ops.augment_views import reference
from rcmstr_fast.ops.augment_views.presets import OPERATIONS, AugmentPreset, PresetLike, views_of
from rcmstr_fast.ops.permutation import permute_strips

#: The operations that are there, in the order in which they are applied.
FIXED_ORDER = ("contrast", "blur", "crop_rows", "crop_columns", "perspective", "sharpen")


def chosen(rows: np.ndarray, name: str) -> np.ndarray:
    """[n] bool: which rows of parameters [n, ROW] apply the operation `name`."""
    return (rows[:, layout.ORDER : layout.CONTRAST] == OPERATIONS.index(name)).any(1)


def source_maps(rows: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crops and perspective as one homography of pixel positions.

    Args:
        rows: [n, ROW] float32 parameters.
        height: of the images, pixels.
        width: of the images, pixels.
    Returns:
        [n, 3, 3] float32; takes an output position (x, y, 1), corners at 0 and the size, to where it reads.
    """
    maps = np.tile(np.eye(3), (len(rows), 1, 1))
    for i in np.flatnonzero(chosen(rows, "perspective")):
        maps[i] = np.reshape(
            [*reference.homography(rows[i, layout.CORNERS : layout.JITTER_ORDER].tolist()), 1.0], (3, 3)
        )
    crop = np.tile(np.eye(3), (len(rows), 1, 1))
    for axis, name, first in ((1, "crop_rows", layout.ROWS), (0, "crop_columns", layout.COLUMNS)):
        shares = rows[:, first : first + 2] * chosen(rows, name)[:, None]
        crop[:, axis, axis], crop[:, axis, 2] = 1.0 - shares.sum(1), shares[:, 0]
    size = np.diag([width, height, 1.0])
    return (size @ crop @ maps @ np.linalg.inv(size)).astype(np.float32)


class DaliViews:
    """Makes views with a DALI pipeline; a call has the arguments and the result of `augment_views`.

    Args:
        batch: largest number of pictures in a call: images times views.
        threads: of DALI.
        device: of the images.
    """

    def __init__(self, *, batch: int, threads: int, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._lock = threading.Lock()
        self._pipeline = _chain(self._gpu)(
            batch_size=batch,
            num_threads=threads,
            device_id=(device.index or 0) if self._gpu else None,
            exec_dynamic=True,
            prefetch_queue_depth=1,
        )
        self._pipeline.build()

    def __call__(
        self,
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
    ) -> Tensor:
        """Views of a batch; arguments and result as for `augment_views`. An index on a GPU is waited for."""
        rows = torch.stack(
            [
                layout.draw_parameters(index.cpu(), seed=seed, epoch=epoch, view=view, preset=of_view)
                for view, of_view in enumerate(_checked(views_of(preset, num_views)))
            ]
        )
        made = self.apply(images_uint8, rows).to(dtype)
        if order is None:
            return made
        permuted = permute_strips(made[0], order, num_patches=order.shape[1], group_size=len(order))
        return torch.cat([made.permute(0, 1, 3, 4, 2), permuted.permute(0, 2, 3, 1)[None]]).permute(0, 1, 4, 2, 3)

    def apply(self, images: Tensor, rows: Tensor) -> Tensor:
        """Views [V, B, 3, H, W] of images [B, H, W, 3] uint8 with the parameters rows [V, B, ROW]."""
        values = _arguments(rows.flatten(0, 1).numpy(), *images.shape[1:3])
        stream = torch.cuda.current_stream(images.device) if self._gpu else None
        repeated = images.expand(len(rows), *images.shape).reshape(-1, *images.shape[1:]).contiguous()
        with self._lock:
            self._pipeline.feed_input("images", repeated if self._gpu else repeated.numpy(), cuda_stream=stream)
            for name, value in values.items():
                self._pipeline.feed_input(name, value)
            (made,) = self._pipeline.run(stream)
        views = torch.from_dlpack(made.as_tensor())
        return views.view(len(rows), *images.shape).permute(0, 1, 4, 2, 3)


def _checked(presets: tuple[AugmentPreset, ...]) -> tuple[AugmentPreset, ...]:
    for preset in presets:
        if others := set(preset.names) - {*FIXED_ORDER, "piecewise_affine"}:
            raise ConfigError(f"DALI's views must have operations of {', '.join(FIXED_ORDER)}, got {', '.join(others)}")
    return presets


def _arguments(rows: np.ndarray, height: int, width: int) -> dict[str, np.ndarray]:
    """What the operators need, one row a view."""
    sigma = rows[:, layout.SIGMA]
    alpha, lightness = (rows[:, layout.SHARPEN + i] * chosen(rows, "sharpen") for i in (0, 1))
    kernel = np.broadcast_to(-alpha[:, None, None], (len(rows), 3, 3)).copy()
    kernel[:, 1, 1] = 1.0 - alpha + alpha * (8.0 + lightness)
    return {
        "contrasting": chosen(rows, "contrast"),
        "contrast": rows[:, layout.CONTRAST].copy(),
        "blurring": chosen(rows, "blur"),
        "sigma": sigma.copy(),
        "window": 2 * np.minimum(3.0 * sigma.astype(np.float64) + 0.5, rows[:, layout.RADIUS]).astype(np.int32) + 1,
        "warping": chosen(rows, "perspective") | chosen(rows, "crop_rows") | chosen(rows, "crop_columns"),
        "matrix": source_maps(rows, height, width),
        "sharpening": chosen(rows, "sharpen"),
        "kernel": kernel,
    }


def _chain(gpu: bool) -> Any:
    """The pipeline's definition; DALI reads its `if` as a choice for each sample."""

    @dali.pipeline_def(enable_conditionals=True)
    def chain() -> Any:
        def given(name: str, kind: Any, dimensions: int) -> Any:
            return fn.external_source(name=name, batch=True, dtype=kind, ndim=dimensions)

        where = "gpu" if gpu else "cpu"
        images = fn.external_source(name="images", batch=True, dtype=types.UINT8, ndim=3, layout="HWC", device=where)
        view = fn.cast(images, dtype=types.FLOAT)
        contrast, sigma = given("contrast", types.FLOAT, 0), given("sigma", types.FLOAT, 0)
        matrix, kernel = given("matrix", types.FLOAT, 2), given("kernel", types.FLOAT, 2)
        window = given("window", types.INT32, 0)
        if given("contrasting", types.BOOL, 0):
            view = fn.brightness_contrast(view, contrast=contrast, contrast_center=127.0, dtype=types.FLOAT)
        if given("blurring", types.BOOL, 0):
            view = fn.gaussian_blur(view, sigma=sigma, window_size=window)
        if given("warping", types.BOOL, 0):
            view = fn.experimental.warp_perspective(view, matrix.gpu() if gpu else matrix, border_mode="replicate")
        if given("sharpening", types.BOOL, 0):
            view = dali.math.clamp(fn.filter(view, kernel.gpu() if gpu else kernel, border="clamp"), 0.0, 255.0)
        return view * np.float32(1 / 127.5) - np.float32(1.0)

    return chain
