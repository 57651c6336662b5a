"""Which encoded pictures can be handed to a decoder that fails for a whole batch: sound, plain JPEG files."""

import math

_SOF = frozenset((0xC0, 0xC1, 0xC2))
_OTHER_SOF = frozenset(range(0xC0, 0xD0)) - _SOF - {0xC4}
_SOS, _APP1, _APP14 = 0xDA, 0xE1, 0xEE


def plain_jpeg(data: bytes | None, *, max_pixels: int, min_side: int, tallest: float = math.inf) -> bool:
    """Whether the headers describe a JPEG of 8 bits, grey or YCbCr, that is complete and of a usable size.

    Files with EXIF (they may be rotated) or an Adobe segment (CMYK, RGB), lossless, arithmetic-coded and otherwise
    rare ones are left to the general decoder. The coded pixels themselves are not looked at.

    Args:
        data: the encoded file; None: a missing record.
        max_pixels: most pixels.
        min_side: shortest side, pixels.
        tallest: pictures of this height / width or more are left to the general decoder, which turns them.
    """
    if not data or data[:2] != b"\xff\xd8" or data.rfind(b"\xff\xd9") < 0:
        return False
    at, usable = 2, False
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        body = at + 4
        if marker == _SOS:
            return usable and data.rfind(b"\xff\xd9") > at + length
        if marker in _OTHER_SOF or marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF or length < 2:
            return False
        if marker == _APP14 or (marker == _APP1 and data[body : body + 4] == b"Exif"):
            return False
        if marker in _SOF:
            if usable or len(data) < body + 6:
                return False
            height, width = data[body + 1] << 8 | data[body + 2], data[body + 3] << 8 | data[body + 4]
            usable = (
                data[body] == 8
                and data[body + 5] in (1, 3)
                and min(height, width) >= max(1, min_side)
                and height * width <= max_pixels
                and height < tallest * width
            )
            if not usable:
                return False
        at += 2 + length
    return False
