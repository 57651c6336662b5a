"""Encoded bytes to RGB pixels of one size, with every broken picture named by a reason."""

import io
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

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
_CHUNK = 16

# The size is checked here against `max_pixels`, and damaged metadata does not matter to the pixels.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class BrokenImage(ValueError):
    """A record that is no usable picture; the message is the reason."""


def decode_image(data: bytes, height: int, width: int, *, max_pixels: int, min_side: int) -> np.ndarray:
    """Decode one picture and resize it, bicubic, without keeping its aspect.

    Grey, palette, CMYK and 16-bit pictures become RGB, transparency is laid on white, an EXIF rotation is
    applied, and of an animation the first frame is taken. JPEG's reduced-size decoding is not used: its
    pixels differ from those of the full picture resized.

    Args:
        data: the encoded file.
        height: of the result, pixels.
        width: of the result, pixels.
        max_pixels: a picture with more pixels is broken; checked before decoding.
        min_side: a picture with a shorter side, in pixels, is broken; checked before decoding.
    Returns:
        [height, width, 3] uint8 RGB.
    Raises:
        BrokenImage: with the reason.
    """
    if not data:
        raise BrokenImage("zero bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            _check_size(picture.size, max_pixels, min_side)
            picture.load()
            return fitted(picture, height, width)
    except BrokenImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise BrokenImage(f"not a picture ({len(data)} bytes)") from error
    except Exception as error:  # a parser over arbitrary bytes fails with nearly any type
        raise BrokenImage(f"{type(error).__name__}: {error}") from error


def fitted(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """An opened picture as `decode_image` gives it: upright, RGB, resized; [height, width, 3] uint8."""
    return np.array(_rgb(_upright(picture)).resize((width, height), Image.Resampling.BICUBIC))


def decode_batch(
    items: Sequence[bytes | None],
    height: int,
    width: int,
    *,
    max_pixels: int,
    min_side: int,
    pool: Executor | None = None,
) -> tuple[np.ndarray, dict[int, str]]:
    """Decode a batch, in threads where a pool is given (Pillow decodes without the GIL).

    Args:
        items: encoded pictures; None: the record could not be read.
        height: as in `decode_image`.
        width: as in `decode_image`.
        max_pixels: as in `decode_image`.
        min_side: as in `decode_image`.
        pool: runs the parts of the batch.
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
                images[i] = decode_image(data, height, width, max_pixels=max_pixels, min_side=min_side)
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
    """

    def __init__(self, *, height: int, width: int, max_pixels: int, min_side: int) -> None:
        self.height, self.width, self.max_pixels, self.min_side = height, width, max_pixels, min_side

    def decode(self, items: Sequence[bytes | None]) -> tuple[np.ndarray, dict[int, str]]:
        """`decode_batch` in the calling thread."""
        return decode_batch(items, self.height, self.width, max_pixels=self.max_pixels, min_side=self.min_side)

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


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF of any kind; the pixels are sound
        return picture
    return picture if turn is None else picture.transpose(turn)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if picture.mode.startswith("I"):  # 16 bits a sample, which Pillow would clip instead of scale
        values = np.clip(np.asarray(picture).astype(np.float32) / 257, 0, 255)
        picture = Image.fromarray(np.rint(values).astype(np.uint8))
    elif picture.mode == "F":  # floating point samples are in [0, 1]
        values = np.clip(np.nan_to_num(np.asarray(picture)) * 255, 0, 255)
        picture = Image.fromarray(np.rint(values).astype(np.uint8))
    return picture.convert("RGB")
