"""An LMDB as found in the wild: mostly words, flipped bytes in 1 % of them, and one of every hostile kind."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from rcmstr_fast.data.lmdb_writer import write_lmdb

SOUND = 200


def word(i: int, mode: str = "RGB", size: tuple[int, int] = (60, 24), format: str = "JPEG", **options) -> bytes:
    """A soft random picture in the given mode and format."""
    rng = np.random.default_rng(i)
    small = Image.fromarray(rng.integers(0, 256, (4, 10, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).convert(mode).save(out, format, **options)
    return out.getvalue()


def bomb() -> bytes:
    """A PNG of 50,000 x 50,000 pixels in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )


def jpeg_bomb() -> bytes:
    """A small JPEG that says it has 65,000 x 65,000 pixels."""
    data = bytearray(word(1))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 65_000, 65_000)
    return bytes(data)


def sixteen_bit() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 1440).reshape(24, 60).astype(np.uint16)).save(out, "PNG")
    return out.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return word(2, exif=exif)


def animation() -> bytes:
    frames = [Image.new("P", (60, 24), i) for i in range(3)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


def unusual() -> dict[str, bytes]:
    """Pictures that must be shown."""
    return {
        "cmyk": word(3, "CMYK"),
        "sixteen": sixteen_bit(),
        "grey": word(4, "L"),
        "alpha": word(5, "RGBA", format="PNG"),
        "rotated": rotated(),
        "animation": animation(),
        "progressive": word(6, progressive=True),
    }


def unusable() -> dict[str, bytes]:
    """Records that must be named and replaced."""
    return {
        "truncated": word(7)[:300],
        "truncated in the header": word(7)[:100],
        "bomb": bomb(),
        "jpeg bomb": jpeg_bomb(),
        "one pixel": word(8, size=(1, 1)),
        "zero bytes": b"",
        "text": b"<html>not found</html>",
        "truncated png": word(9, format="PNG")[:-40],
    }


def flipped(data: bytes, seed: int, count: int = 20) -> bytes:
    """The picture with bytes changed anywhere."""
    rng = np.random.default_rng(seed)
    damaged = bytearray(data)
    for place in rng.integers(0, len(data), count):
        damaged[place] ^= int(rng.integers(1, 256))
    return bytes(damaged)


def write_hostile(folder: Path, flip: int = SOUND // 100) -> list[str]:
    """Write the LMDB; returns what each record is, in their order: sound, flipped, or a kind."""
    records = {f"sound {i}": word(i) for i in range(SOUND)}
    for i in range(flip):
        records[f"flipped {i}"] = flipped(records.pop(f"sound {i * SOUND // flip}"), i)
    records |= unusual() | unusable()
    write_lmdb(folder, ((data, None) for data in records.values()))
    return list(records)
