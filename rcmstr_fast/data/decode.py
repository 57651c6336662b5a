"""Encoded bytes to RGB pixels of one size, with every broken picture named by a reason."""

import io
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# A fixed list: others of Pillow's formats run external programs or are no photographs.
Image.init()
_FORMATS = tuple(name for name in ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF") if name in Image.OPEN)
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_TURNS[i] for i in (5, 6, 7, 8)]
_CHUNK = 16
#: From this height / width on a picture is tall: its text is taken to run downwards.
TALL = 1.5
Rotate = Literal["never", "tall"]
# Tags of TIFF, and the values looked for.
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
_SAMPLES, _SIGNED = 339, (2, (2,))
#: What white may be in pictures whose samples do not say it by their type.
_WHITE_WHOLE, _WHITE_FLOAT = (255, 65535, 2**31 - 1, 2**32 - 1), (1, 255, 65535)

# The size is checked here against `max_pixels`, and damaged metadata does not matter to the pixels.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class BrokenImage(ValueError):
    """A record that is no usable picture; the message is the reason."""


def decode_image(
    data: bytes, height: int, width: int, *, max_pixels: int, min_side: int, rotate: Rotate = "never"
) -> np.ndarray:
    """Decode one picture and resize it, bicubic, without keeping its aspect.

    Grey, palette, CMYK, 16-bit, 32-bit and floating-point pictures become RGB, transparency is laid on white (on
    black where white would hide the text), an EXIF rotation is applied, and of an animation the first frame is taken.
    JPEG's reduced-size decoding is not used: its pixels differ from those of the full picture resized.

    Args:
        data: the encoded file.
        height: of the result, pixels.
        width: of the result, pixels.
        max_pixels: a picture with more pixels is broken; checked before decoding.
        min_side: a picture with a shorter side, in pixels, is broken; checked before decoding.
        rotate: `tall` turns pictures whose height is `TALL` times their width or more by 90 degrees, anticlockwise.
    Returns:
        [height, width, 3] uint8 RGB.
    Raises:
        BrokenImage: with the reason.
    """
    return _resized(decode_picture(data, max_pixels=max_pixels, min_side=min_side), height, width, rotate)


def decode_picture(data: bytes, *, max_pixels: int, min_side: int) -> Image.Image:
    """`decode_image` before it rotates tall pictures and resizes: the upright RGB picture in its own size."""
    if not data:
        raise BrokenImage("zero bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            _check_size(picture.size, max_pixels, min_side)
            _mend_key(picture)
            picture.load()
            return _upright(picture)
    except BrokenImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise BrokenImage(f"not a picture ({len(data)} bytes)") from error
    except Exception as error:  # a parser over arbitrary bytes fails with nearly any type
        raise BrokenImage(f"{type(error).__name__}: {error}") from error


def picture_size(data: bytes | None) -> tuple[int, int] | None:
    """(width, height) in pixels of the upright picture, out of its header; None where it cannot be read."""
    try:
        with Image.open(io.BytesIO(data or b""), formats=_FORMATS) as picture:
            width, height = picture.size
            return (height, width) if _turn(picture) in _SIDEWAYS else (width, height)
    except Exception:  # as in decode_picture
        return None


def fitted(picture: Image.Image, height: int, width: int, rotate: Rotate = "never") -> np.ndarray:
    """An opened picture as `decode_image` gives it: upright, RGB, resized; [height, width, 3] uint8."""
    return _resized(_upright(picture), height, width, rotate)


def _upright(picture: Image.Image) -> Image.Image:
    turn, rgb = _turn(picture), _rgb(picture)
    return rgb if turn is None else rgb.transpose(turn)


def _resized(picture: Image.Image, height: int, width: int, rotate: Rotate) -> np.ndarray:
    if rotate == "tall" and picture.height >= TALL * picture.width:
        picture = picture.transpose(Image.Transpose.ROTATE_90)
    return np.array(picture.resize((width, height), Image.Resampling.BICUBIC))


def decode_batch(
    items: Sequence[bytes | None],
    height: int,
    width: int,
    *,
    max_pixels: int,
    min_side: int,
    pool: Executor | None = None,
    rotate: Rotate = "never",
) -> tuple[np.ndarray, dict[int, str]]:
    """Decode a batch, in threads where a pool is given (Pillow decodes without the GIL).

    Args:
        items: encoded pictures; None: the record could not be read.
        height: as in `decode_image`.
        width: as in `decode_image`.
        max_pixels: as in `decode_image`.
        min_side: as in `decode_image`.
        pool: runs the parts of the batch.
        rotate: as in `decode_image`.
    Returns:
        [n, height, width, 3] uint8 (undefined at broken items), and position -> reason of the broken ones.
    """
    images = np.empty((len(items), height, width, 3), np.uint8)

    def part(first: int) -> dict[int, str]:
        broken = {}
        for i in range(first, min(first + _CHUNK, len(items))):
            try:
                data = items[i]
                if data is None:
                    raise BrokenImage("missing or unreadable record")
                images[i] = decode_image(data, height, width, max_pixels=max_pixels, min_side=min_side, rotate=rotate)
            except BrokenImage as error:
                broken[i] = str(error)
        return broken

    starts = range(0, len(items), _CHUNK)
    found: dict[int, str] = {}
    for broken in pool.map(part, starts) if pool else map(part, starts):
        found |= broken
    return images, found


def chunks(count: int, workers: int) -> list[slice]:
    """Parts of a batch for `workers` threads: as long as helps, short enough for all threads to have work."""
    length = max(1, min(_CHUNK, -(-count // workers)))
    return [slice(first, min(first + length, count)) for first in range(0, count, length)]


class PillowDecoder:
    """Reads, decodes and resizes batches in threads.

    Args:
        height: of the images, pixels.
        width: of the images, pixels.
        max_pixels: as in `decode_image`.
        min_side: as in `decode_image`.
        rotate: as in `decode_image`.
    """

    def __init__(self, *, height: int, width: int, max_pixels: int, min_side: int, rotate: Rotate = "never") -> None:
        self.height, self.width, self.max_pixels, self.min_side = height, width, max_pixels, min_side
        self.rotate: Rotate = rotate

    def decode(self, items: Sequence[bytes | None]) -> tuple[np.ndarray, dict[int, str]]:
        """`decode_batch` in the calling thread."""
        return decode_batch(
            items,
            self.height,
            self.width,
            rotate=self.rotate,
            max_pixels=self.max_pixels,
            min_side=self.min_side,
        )

    def load(
        self, read: Callable[[np.ndarray], Sequence[bytes | None]], records: np.ndarray, pool: Executor, workers: int
    ) -> tuple[Tensor, dict[int, str]]:
        """Images of the records.

        Args:
            read: records [n] -> n encoded pictures; None: missing or unreadable.
            records: [B] int64.
            pool: reads and decodes parts of the batch.
            workers: threads of the pool.
        Returns:
            [B, height, width, 3] uint8 (undefined at broken places), and place -> reason of the broken ones.
        """
        images = np.empty((len(records), self.height, self.width, 3), np.uint8)

        def part(piece: slice) -> dict[int, str]:
            images[piece], found = self.decode(read(records[piece]))
            return {piece.start + i: reason for i, reason in found.items()}

        broken: dict[int, str] = {}
        for found in pool.map(part, chunks(len(records), workers)):
            broken |= found
        return torch.from_numpy(images), broken


def _check_size(size: tuple[int, int], max_pixels: int, min_side: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BrokenImage(f"{height} x {width} pixels, more than max_pixels={max_pixels}")
    if min(size) < min_side:
        raise BrokenImage(f"{height} x {width} pixels, a side is shorter than min_side={min_side}")


def _turn(picture: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF of any kind; the pixels are sound
        return None


def _mend_key(picture: Image.Image) -> None:
    """Bring PNG's transparent colour, which Pillow keeps as in the file, to the 8 bits that it gives the samples."""
    key = picture.info.get("transparency")
    tiles = getattr(picture, "tile", None) if picture.format == "PNG" else None
    kind = tiles[0][3] if tiles else None
    if kind in ("L;2", "L;4") and isinstance(key, int):
        picture.info["transparency"] = key * (85 if kind == "L;2" else 17)
    elif kind == "RGB;16B" and isinstance(key, tuple):
        picture.info["transparency"] = tuple(value >> 8 for value in key)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        layer = _eight_bits(picture)
    elif picture.has_transparency_data:
        layer = picture.convert("RGBA")
    else:
        return picture.convert("RGB")
    return _without_alpha(layer) if layer.mode == "RGBA" else layer.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Grey samples of more than 8 bits, which Pillow would clip instead of scale; RGBA where a grey is transparent.

    16-bit samples say what white is. 32-bit and floating-point ones do not: white is the smallest usual value
    that none of them is above (by more than an overshoot, for floating point).
    """
    values, tags = np.asarray(picture), getattr(picture, "tag_v2", {})
    key = picture.info.get("transparency")
    if picture.mode == "F":
        values = np.nan_to_num(values)
        white = next((white for white in _WHITE_FLOAT if values.max() <= 2 * white), values.max())
    elif picture.mode == "I":
        values = values.astype(np.int64)
        if tags.get(_SAMPLES, 1) not in _SIGNED:  # Pillow makes signed ones of unsigned ones
            values %= 2**32
        white = next(white for white in _WHITE_WHOLE if values.max() <= white)
    else:
        white = 65535
    grey = np.rint(np.clip(values.astype(np.float64) / white * 255, 0, 255)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    if not isinstance(key, int):
        return Image.fromarray(grey)
    alpha = np.where(values == key, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([grey, grey, grey, alpha], axis=2))


def _without_alpha(layer: Image.Image) -> Image.Image:
    """An RGBA picture laid on white, or on black where white would leave less than a quarter of its contrast."""
    laid = [
        Image.alpha_composite(Image.new("RGBA", layer.size, colour), layer).convert("RGB")
        for colour in ("white", "black")
    ]
    contrast = [float(np.asarray(picture.convert("L")).std()) for picture in laid]
    return laid[1] if 4 * contrast[0] < contrast[1] else laid[0]
