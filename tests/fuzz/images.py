"""Pictures of every format that is read, and what becomes of damaged ones."""

import random

from rcmstr_fast.data.decode import BrokenImage, decode_image
from tests.data.hostile import word
from tests.fuzz.mutate import damaged

#: Format -> options of sound pictures.
FORMATS: dict[str, list[dict]] = {
    "JPEG": [{}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}],
    "PNG": [{}, {"mode": "RGBA"}, {"mode": "P"}, {"mode": "1"}],
    "WEBP": [{}, {"lossless": True}, {"mode": "RGBA"}],
    "TIFF": [{}, {"compression": "tiff_lzw"}, {"mode": "L"}, {"compression": "jpeg"}],
    "GIF": [{"mode": "P"}],
    "BMP": [{}],
}


def seeds(name: str) -> list[bytes]:
    """Sound pictures of a format."""
    return [word(i, format=name, **options) for i, options in enumerate(FORMATS[name])]


class Pictures:
    """Damaged pictures of one format are decoded, or refused with a reason."""

    def __init__(self, name: str) -> None:
        self.seeds = seeds(name)

    def attempt(self, drawn: random.Random) -> str:
        data = damaged(drawn.choice(self.seeds), drawn, end=drawn.choice((None, 64, 400)))
        try:
            made = decode_image(data, 32, 100, max_pixels=1_000_000, min_side=2)
        except BrokenImage as error:
            assert str(error)
            return "refused"
        assert made.shape == (32, 100, 3)
        return "taken"
