"""The views of `augment_views` one picture at a time with NumPy, SciPy and Pillow, as published recipes write it."""

import numpy as np
from PIL import Image
from scipy import ndimage

from rcmstr_fast.ops.augment_views import OPERATIONS as NAMES
from rcmstr_fast.ops.augment_views import parameters as layout
from rcmstr_fast.ops.augment_views import reference


def _contrast(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    return 127.0 + row[layout.CONTRAST] * (image - 127.0)


def _blur(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    sigma = float(row[layout.SIGMA])
    radius = min(int(3.0 * sigma + 0.5), int(row[layout.RADIUS]))
    return ndimage.gaussian_filter(image, sigma, mode="nearest", radius=radius, axes=(0, 1))


def _crop(image: np.ndarray, row: np.ndarray, first: int, rows: bool) -> np.ndarray:
    height, width = image.shape[:2]
    low, high = float(row[first]), 1.0 - float(row[first + 1])
    box = (0, low * height, width, high * height) if rows else (low * width, 0, high * width, height)
    planes = [
        Image.fromarray(image[..., c]).transform(
            (width, height), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR
        )
        for c in range(3)
    ]
    return np.stack([np.asarray(plane) for plane in planes], -1)


def _sharpen(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    alpha, lightness = row[layout.SHARPEN : layout.SHARPEN + 2]
    kernel = np.full((3, 3, 1), -alpha, np.float32)
    kernel[1, 1] = 1.0 - alpha + alpha * (8.0 + lightness)
    return ndimage.convolve(image, kernel, mode="nearest").clip(0.0, 255.0)


def _read(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear at positions in fractions of the size."""
    at = (y * image.shape[0] - 0.5, x * image.shape[1] - 0.5)
    return np.stack([ndimage.map_coordinates(image[..., c], at, order=1, mode="nearest") for c in range(3)], -1)


def _positions(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, x = ((np.arange(n, dtype=np.float32) + 0.5) / n for n in image.shape[:2])
    return np.meshgrid(y, x, indexing="ij")  # type: ignore[return-value]


def _piecewise_affine(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    y, x = _positions(image)
    shifts = row[layout.GRID : layout.CORNERS].reshape(4, 4, 2)
    moved = [ndimage.map_coordinates(shifts[..., i], (3 * y, 3 * x), order=1, mode="nearest") for i in (0, 1)]
    return _read(image, y + moved[0], x + moved[1])


def _perspective(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    y, x = _positions(image)
    a, b, c, d, e, f, g, h = reference.homography(row[layout.CORNERS : layout.JITTER_ORDER].tolist())
    scale = 1.0 / (g * x + h * y + 1.0)
    return _read(image, (d * x + e * y + f) * scale, (a * x + b * y + c) * scale)


def _rotate(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    return ndimage.rotate(image, -float(row[layout.ANGLE]), reshape=False, order=1, mode="nearest")


def _resized_crop(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    top, left, tall, wide = (float(share) for share in row[layout.BOX : layout.RADIUS])
    box = (left * width, top * height, (left + wide) * width, (top + tall) * height)
    planes = [
        Image.fromarray(np.ascontiguousarray(image[..., c])).transform(
            (width, height), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR
        )
        for c in range(3)
    ]
    return np.stack([np.asarray(plane) for plane in planes], -1)


def _brightness(image: np.ndarray) -> np.ndarray:
    return image @ np.array([[0.299], [0.587], [0.114]], np.float32)


def _colour_jitter(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    for step in row[layout.JITTER_ORDER : layout.BOX].astype(int):
        amount = row[layout.JITTER + step]
        if step == 3:
            image = _hue(image, amount)
        else:
            base = (0.0, _brightness(image).mean(), _brightness(image))[step]
            image = (base + amount * (image - base)).clip(0.0, 255.0)
    return image


def _hue(image: np.ndarray, shift: float) -> np.ndarray:
    red, green, blue = np.moveaxis(image, 2, 0)
    value = image.max(2)
    chroma = value - image.min(2)
    per = np.divide(1.0, chroma, out=np.zeros_like(chroma), where=chroma > 0)
    sectors = [(green - blue) * per, 2.0 + (blue - red) * per, 4.0 + (red - green) * per]
    hue = np.select([value == red, value == green], sectors[:2], sectors[2]) + 6.0 * shift
    distance = (hue[..., None] + np.array([5.0, 3.0, 1.0], np.float32)) % 6.0
    return value[..., None] - chroma[..., None] * np.minimum(distance, 4.0 - distance).clip(0.0, 1.0)


OPERATIONS = {
    "contrast": _contrast,
    "blur": _blur,
    "crop_rows": lambda image, row: _crop(image, row, layout.ROWS, True),
    "crop_columns": lambda image, row: _crop(image, row, layout.COLUMNS, False),
    "sharpen": _sharpen,
    "piecewise_affine": _piecewise_affine,
    "perspective": _perspective,
    "flip": lambda image, row: image[:, ::-1],
    "rotate": _rotate,
    "colour_jitter": _colour_jitter,
    "grey": lambda image, row: np.repeat(_brightness(image), 3, axis=2),
    "solarise": lambda image, row: np.where(image >= row[layout.THRESHOLD], 255.0 - image, image),
    "resized_crop": _resized_crop,
}


def augment_image(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    """One view [H, W, 3] float32, normalised, of a picture [H, W, 3] uint8 with a row of parameters [ROW]."""
    made = image.astype(np.float32)
    for code in row[layout.ORDER : layout.ORDER + int(row[layout.COUNT])]:
        made = OPERATIONS[NAMES[int(code)]](made, row)
    return (made / 255.0 - 0.5) / 0.5
