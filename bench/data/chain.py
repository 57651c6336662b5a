"""The chain of SPEC section 7 one picture at a time with NumPy, SciPy and Pillow, as published recipes write it."""

import numpy as np
from PIL import Image
from scipy import ndimage

from rcmstr_fast.ops.reference import augment as reference


def _contrast(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    return 127.0 + row[reference.CONTRAST] * (image - 127.0)


def _blur(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(image, (row[reference.SIGMA], row[reference.SIGMA], 0), mode="nearest", truncate=3.0)


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
    alpha, lightness = row[reference.SHARPEN : reference.SHARPEN + 2]
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
    shifts = row[reference.GRID : reference.CORNERS].reshape(4, 4, 2)
    moved = [ndimage.map_coordinates(shifts[..., i], (3 * y, 3 * x), order=1, mode="nearest") for i in (0, 1)]
    return _read(image, y + moved[0], x + moved[1])


def _perspective(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    y, x = _positions(image)
    a, b, c, d, e, f, g, h = reference.homography(row[reference.CORNERS :].tolist())
    scale = 1.0 / (g * x + h * y + 1.0)
    return _read(image, (d * x + e * y + f) * scale, (a * x + b * y + c) * scale)


OPERATIONS = {
    "contrast": _contrast,
    "blur": _blur,
    "crop_rows": lambda image, row: _crop(image, row, reference.ROWS, True),
    "crop_columns": lambda image, row: _crop(image, row, reference.COLUMNS, False),
    "sharpen": _sharpen,
    "piecewise_affine": _piecewise_affine,
    "perspective": _perspective,
}


def augment_image(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    """One view [H, W, 3] float32, normalised, of a picture [H, W, 3] uint8 with a row of parameters [ROW]."""
    made = image.astype(np.float32)
    for code in row[reference.ORDER : reference.ORDER + int(row[reference.COUNT])]:
        made = OPERATIONS[reference.OPERATIONS[int(code)]](made, row)
    return (made / 255.0 - 0.5) / 0.5
