"""Augmented views in plain PyTorch: the meaning of `augment_views`.

A view applies operations, chosen and ordered by its preset, to an image of grey levels in [0, 255], kept as
floating point and never rounded. Positions are fractions of the height and width; the centre of pixel i of n is
(i + 0.5) / n. A geometric operation says where each output position reads, cut to the rectangle of the pixel
centres (edge padding); a run of consecutive geometric operations is one composed map, sampled once, bilinearly.
Pixel operations in between are applied where the order puts them; beyond the border they see the nearest pixel.
"""

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rcmstr_fast.ops.augment_views.parameters import (
    ANGLE,
    BOX,
    COLUMNS,
    CONTRAST,
    CORNERS,
    COUNT,
    GRID,
    JITTER,
    JITTER_ORDER,
    ORDER,
    RADIUS,
    ROWS,
    SHARPEN,
    SIGMA,
    THRESHOLD,
    draw_parameters,
)
from rcmstr_fast.ops.augment_views.presets import OPERATIONS, views_of
from rcmstr_fast.ops.reference.permutation import permute_strips

#: Shares of red, green and blue in the brightness of a pixel (ITU-R BT.601).
BRIGHTNESS = (0.299, 0.587, 0.114)

_GEOMETRIC = ("crop_rows", "crop_columns", "piecewise_affine", "perspective", "flip", "rotate", "resized_crop")


def augment_image(image: Tensor, row: Tensor) -> Tensor:
    """One view of one image.

    Args:
        image: [H, W, 3] floating point, grey levels in [0, 255].
        row: [ROW] float32 parameters.
    Returns:
        [H, W, 3] like image, grey levels in [0, 255].
    """
    values = row.tolist()
    names = [OPERATIONS[int(code)] for code in values[ORDER : ORDER + int(values[COUNT])]]
    for geometric, run in groupby(names, _GEOMETRIC.__contains__):
        if geometric:
            image = _warp(image, values, list(run))
        else:
            for name in run:
                image = _PIXELWISE[name](image, values)
    return image


def apply_parameters(images_uint8: Tensor, rows: Tensor) -> Tensor:
    """Views with given parameters.

    Args:
        images_uint8: [B, H, W, 3] uint8.
        rows: [V, B, ROW] float32 parameters.
    Returns:
        [V, B, 3, H, W] float32, (x / 255 - 0.5) / 0.5; each view in channels_last memory.
    """
    images = images_uint8.float()
    rows = rows.cpu()
    views = torch.empty((len(rows), *images.shape), device=images.device)
    for view in range(len(rows)):
        for item, image in enumerate(images):
            views[view, item] = (augment_image(image, rows[view, item]) / 255.0 - 0.5) / 0.5
    return views.permute(0, 1, 4, 2, 3)


def augment_views(
    images_uint8: Tensor,
    *,
    seed: int,
    epoch: int,
    index: Tensor,
    num_views: int,
    size: tuple[int, int],
    preset: Any = "pretrain",
    order: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random views of a batch; arguments and result as `rcmstr_fast.ops.augment_views`."""
    rows = [
        draw_parameters(index, seed=seed, epoch=epoch, view=view, preset=of_view)
        for view, of_view in enumerate(views_of(preset, num_views))
    ]
    views = apply_parameters(images_uint8, torch.stack(rows)).to(dtype)
    if order is None:
        return views
    permuted = permute_strips(views[0], order, num_patches=order.shape[1], group_size=len(order))
    return torch.cat([views.permute(0, 1, 3, 4, 2), permuted.permute(0, 2, 3, 1)[None]]).permute(0, 1, 4, 2, 3)


def _contrast(image: Tensor, row: list[float]) -> Tensor:
    return 127.0 + row[CONTRAST] * (image - 127.0)


def _blur(image: Tensor, row: list[float]) -> Tensor:
    """Separable Gaussian, cut off at radius floor(3 sigma + 0.5) or earlier, and scaled to sum 1."""
    sigma = row[SIGMA]
    radius = min(int(3.0 * sigma + 0.5), int(row[RADIUS]))
    offsets = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    taps = torch.exp(-0.5 * (offsets / sigma) ** 2)
    taps = taps / taps.sum()
    planes = F.pad(image.permute(2, 0, 1)[:, None], (radius,) * 4, mode="replicate")
    planes = F.conv2d(F.conv2d(planes, taps[None, None, :, None]), taps[None, None, None])
    return planes[:, 0].permute(1, 2, 0)


def _sharpen(image: Tensor, row: list[float]) -> Tensor:
    """Identity and the 3x3 kernel of -1 around 8 + lightness, blended by alpha; cut to [0, 255]."""
    alpha, lightness = row[SHARPEN], row[SHARPEN + 1]
    kernel = image.new_full((3, 3), -alpha)
    kernel[1, 1] = 1.0 - alpha + alpha * (8.0 + lightness)
    planes = F.pad(image.permute(2, 0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(planes, kernel[None, None])[:, 0].permute(1, 2, 0).clamp(0.0, 255.0)


def _brightness(image: Tensor) -> Tensor:
    """[H, W, 1] weighted mean of the channels."""
    return (image * image.new_tensor(BRIGHTNESS)).sum(2, keepdim=True)


def _grey(image: Tensor, row: list[float]) -> Tensor:
    return _brightness(image).expand_as(image)


def _solarise(image: Tensor, row: list[float]) -> Tensor:
    return torch.where(image >= row[THRESHOLD], 255.0 - image, image)


def _colour_jitter(image: Tensor, row: list[float]) -> Tensor:
    """Brightness, contrast, saturation and hue in drawn order; each result is cut to [0, 255]."""
    for step in (int(code) for code in row[JITTER_ORDER:BOX]):
        amount = row[JITTER + step]
        if step == 3:
            image = _hue(image, amount)
            continue
        base = (image.new_zeros(()), _brightness(image).mean(), _brightness(image))[step]
        image = (base + amount * (image - base)).clamp(0.0, 255.0)
    return image


def _hue(image: Tensor, shift: float) -> Tensor:
    """The hue of the HSV hexagon, in [0, 6), shifted by 6 * shift; saturation and value stay."""
    red, green, blue = image.unbind(2)
    value = image.amax(2)
    chroma = value - image.amin(2)
    scale = torch.where(chroma > 0, 1.0 / chroma, 0.0)
    sector = torch.where(value == green, 2.0 + (blue - red) * scale, 4.0 + (red - green) * scale)
    sector = torch.where(value == red, (green - blue) * scale, sector) + 6.0 * shift
    distance = (sector[..., None] + image.new_tensor([5.0, 3.0, 1.0])) % 6.0
    return value[..., None] - chroma[..., None] * torch.minimum(distance, 4.0 - distance).clamp(0.0, 1.0)


_PIXELWISE: dict[str, Callable[[Tensor, list[float]], Tensor]] = {
    "contrast": _contrast,
    "blur": _blur,
    "sharpen": _sharpen,
    "grey": _grey,
    "solarise": _solarise,
    "colour_jitter": _colour_jitter,
}


def _warp(image: Tensor, row: list[float], names: list[str]) -> Tensor:
    """A run of geometric operations: the last one's source positions first, the image read once."""
    height, width = image.shape[:2]
    y = ((torch.arange(height, dtype=image.dtype, device=image.device) + 0.5) / height)[:, None].expand(height, width)
    x = ((torch.arange(width, dtype=image.dtype, device=image.device) + 0.5) / width)[None].expand(height, width)
    for name in reversed(names):
        y, x = _source(name, row, y, x, width / height)
        y, x = y.clamp(0.5 / height, 1.0 - 0.5 / height), x.clamp(0.5 / width, 1.0 - 0.5 / width)
    return _bilinear(image, y * height - 0.5, x * width - 0.5)


def _source(name: str, row: list[float], y: Tensor, x: Tensor, aspect: float) -> tuple[Tensor, Tensor]:
    """Where the output positions (y, x) of one geometric operation read, in fractions of the size."""
    if name == "crop_rows":
        return row[ROWS] + y * (1.0 - row[ROWS] - row[ROWS + 1]), x
    if name == "crop_columns":
        return y, row[COLUMNS] + x * (1.0 - row[COLUMNS] - row[COLUMNS + 1])
    if name == "resized_crop":
        top, left, height, width = row[BOX:RADIUS]
        return top + y * height, left + x * width
    if name == "flip":
        return y, 1.0 - x
    if name == "rotate":  # about the middle, in pixels
        cosine, sine = math.cos(math.radians(row[ANGLE])), math.sin(math.radians(row[ANGLE]))
        from_y, from_x = y - 0.5, x - 0.5
        return 0.5 + cosine * from_y - sine * aspect * from_x, 0.5 + cosine * from_x + sine / aspect * from_y
    if name == "piecewise_affine":
        shifts = y.new_tensor(row[GRID:CORNERS]).view(4, 4, 2)
        shift = _bilinear(shifts, 3.0 * y, 3.0 * x)
        return y + shift[..., 0], x + shift[..., 1]
    a, b, c, d, e, f, g, h = homography(row[CORNERS:JITTER_ORDER])
    scale = 1.0 / (g * x + h * y + 1.0)
    return (d * x + e * y + f) * scale, (a * x + b * y + c) * scale


def homography(shifts: list[float]) -> tuple[float, ...]:
    """Coefficients a..h of x' = (a x + b y + c) / (g x + h y + 1), y' = (d x + e y + f) / (same).

    Args:
        shifts: of the unit square's corners, clockwise from the top left, each y then x.
    Returns:
        The map that takes each corner of the unit square to its shifted place.
    """
    y0, x0, y1, x1, y2, x2, y3, x3 = (s + c for s, c in zip(shifts, (0, 0, 0, 1, 1, 1, 1, 0)))
    sum_x, sum_y = x0 - x1 + x2 - x3, y0 - y1 + y2 - y3
    right_x, right_y, left_x, left_y = x1 - x2, y1 - y2, x3 - x2, y3 - y2
    determinant = right_x * left_y - left_x * right_y
    g = (sum_x * left_y - left_x * sum_y) / determinant
    h = (right_x * sum_y - sum_x * right_y) / determinant
    return x1 - x0 + g * x1, x3 - x0 + h * x3, x0, y1 - y0 + g * y1, y3 - y0 + h * y3, y0, g, h


def _bilinear(table: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values of table [h, w, C] at indices y, x [..] (fractional), bilinear; beyond the border the nearest."""
    height, width = table.shape[:2]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    y0, x0 = y.long(), x.long()
    y1, x1 = (y0 + 1).clamp(max=height - 1), (x0 + 1).clamp(max=width - 1)
    wy, wx = (y - y0)[..., None], (x - x0)[..., None]
    top = table[y0, x0] + wx * (table[y0, x1] - table[y0, x0])
    bottom = table[y1, x0] + wx * (table[y1, x1] - table[y1, x0])
    return top + wy * (bottom - top)
