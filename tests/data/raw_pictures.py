"""PNG and TIFF files of every sample depth and kind of transparency, written byte by byte, each with its right RGB.

The picture is a black bar (the text) on white. Written here rather than by Pillow, which cannot write most of them.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np

HEIGHT, WIDTH = 8, 16


def bar() -> np.ndarray:
    """[HEIGHT, WIDTH] 0 where text is, 1 elsewhere."""
    shape = np.ones((HEIGHT, WIDTH))
    shape[2:6, 4:12] = 0
    return shape


def right() -> np.ndarray:
    """[HEIGHT, WIDTH, 3] uint8: black text on white."""
    return np.repeat((255 * bar()).astype(np.uint8)[..., None], 3, axis=2)


def packed(samples: np.ndarray, depth: int, order: str = ">") -> list[bytes]:
    """Rows [H, W, C] of whole numbers below 2^depth, as bytes."""
    rows = samples.reshape(len(samples), -1)
    if depth >= 8:
        return [row.astype(f"{order}u{depth // 8}").tobytes() for row in rows]
    bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
    return [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]


def png(samples: np.ndarray, depth: int, colour: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of samples [H, W, C]; `extra` chunks come before the pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed(samples, depth)))
    chunks = [(b"IHDR", header), *extra, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def tiff(rows: list[bytes], width: int, bits: list[int], photometric: int, *extra: tuple[int, list[int]]) -> bytes:
    """An uncompressed little-endian TIFF of packed rows; `extra` are (tag, shorts)."""
    tags = {
        256: [width],
        257: [len(rows)],
        258: bits,
        259: [1],
        262: [photometric],
        277: [len(bits)],
        278: [len(rows)],
        284: [1],
        **dict(extra),
    }
    data = b"".join(rows)
    tail, entries = b"", []
    count = len(tags) + 2
    tail_at = 8 + 2 + 12 * count + 4
    pixels_at = tail_at + sum(2 * len(v) for v in tags.values() if len(v) > 2)
    for tag, values in sorted([*tags.items(), (273, [pixels_at]), (279, [len(data)])]):
        body = struct.pack(f"<{len(values)}H", *values) if tag not in (273, 279) else struct.pack("<I", *values)
        if len(body) > 4:
            body, tail = struct.pack("<I", tail_at + len(tail)), tail + body
        kind = 4 if tag in (273, 279) else 3
        entries.append(struct.pack("<HHI", tag, kind, len(values)) + body.ljust(4, b"\0"))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", count) + b"".join(entries) + bytes(4) + tail + data


def pngs() -> Iterator[tuple[str, bytes]]:
    """(name, file) of every PNG kind whose right RGB is `right()`."""
    shape = bar()
    for depth in (1, 2, 4, 8, 16):
        top = 2**depth - 1
        grey = (shape * top).astype(np.int64)[..., None]
        yield f"grey {depth}", png(grey, depth, 0)
        yield f"grey {depth}, white is transparent", png(grey, depth, 0, (b"tRNS", struct.pack(">H", top)))
        yield f"grey {depth}, text is transparent", png(grey, depth, 0, (b"tRNS", b"\0\0"))
        if depth > 1:  # a grey that is neither black nor white
            behind = grey // 3
            yield f"grey {depth}, grey is transparent", png(behind, depth, 0, (b"tRNS", struct.pack(">H", top // 3)))
        if depth >= 8:
            opaque, clear = np.full_like(grey, top), grey * 0
            yield f"grey {depth} with alpha", png(np.concatenate([grey, opaque], 2), depth, 4)
            yield f"grey {depth}, text in alpha", png(np.concatenate([clear, top - grey], 2), depth, 4)
            colour = np.repeat(grey, 3, axis=2)
            yield f"colour {depth}", png(colour, depth, 2)
            key = struct.pack(">HHH", top, top, top)
            yield f"colour {depth}, white is transparent", png(colour, depth, 2, (b"tRNS", key))
            behind = (b"tRNS", struct.pack(">HHH", *[top // 3] * 3))
            yield f"colour {depth}, grey is transparent", png(colour // 3, depth, 2, behind)
            yield f"colour {depth}, text is transparent", png(colour, depth, 2, (b"tRNS", bytes(6)))
            yield f"colour {depth} with alpha", png(np.concatenate([colour, opaque], 2), depth, 6)
            yield f"colour {depth}, text in alpha", png(np.concatenate([colour * 0, top - grey], 2), depth, 6)
        if depth <= 8:
            index, table = (shape == 0).astype(np.int64)[..., None], bytes([255] * 3 + [0] * 3)
            yield f"palette {depth}", png(index, depth, 3, (b"PLTE", table))
            yield f"palette {depth}, white is transparent", png(index, depth, 3, (b"PLTE", table), (b"tRNS", b"\0"))
            yield f"palette {depth}, text is transparent", png(index, depth, 3, (b"PLTE", table), (b"tRNS", b"\xff\0"))
            yield f"palette {depth}, alpha", png(index, depth, 3, (b"PLTE", bytes(6)), (b"tRNS", b"\0\xff"))


def tiffs() -> Iterator[tuple[str, bytes]]:
    """(name, file) of every TIFF kind whose right RGB is `right()`."""
    shape = bar()
    for depth in (1, 2, 4, 8, 16, 32):
        top = 2**depth - 1
        grey = (shape * top).astype(np.int64)[..., None]
        yield f"grey {depth}", tiff(packed(grey, depth, "<"), WIDTH, [depth], 1)
        if depth <= 16:
            yield f"grey {depth}, white is zero", tiff(packed(top - grey, depth, "<"), WIDTH, [depth], 0)
        if depth in (8, 16):
            opaque, colour = np.full_like(grey, top), np.repeat(grey, 3, axis=2)
            yield f"colour {depth}", tiff(packed(colour, depth, "<"), WIDTH, [depth] * 3, 2)
            for name, kind in (("unassociated", 2), ("associated", 1)):
                rgba = packed(np.concatenate([colour, opaque], 2), depth, "<")
                yield f"colour {depth} with {name} alpha", tiff(rgba, WIDTH, [depth] * 4, 2, (338, [kind]))
                rgba = packed(np.concatenate([colour * 0, top - grey], 2), depth, "<")
                yield f"colour {depth}, text in {name} alpha", tiff(rgba, WIDTH, [depth] * 4, 2, (338, [kind]))
            if depth == 8:  # Pillow does not know the one of 16 bits, which is a broken record
                both = packed(np.concatenate([grey, opaque], 2), depth, "<")
                yield f"grey {depth} with alpha", tiff(both, WIDTH, [depth] * 2, 1, (338, [2]))
        if depth in (4, 8):
            index = (shape == 0).astype(np.int64)[..., None]
            table = [0xFFFF, 0] + [0] * (2**depth - 2)
            yield f"palette {depth}", tiff(packed(index, depth, "<"), WIDTH, [depth], 3, (320, table * 3))
    for top in (1.0, 255.0, 65535.0):
        rows = [row.astype("<f4").tobytes() for row in shape * top]
        yield f"float to {top:g}", tiff(rows, WIDTH, [32], 1, (339, [3]))
    for name, top in (("int32 to 255", 255), ("int32 to 65535", 65535)):
        rows = [row.astype("<i4").tobytes() for row in shape * top]
        yield name, tiff(rows, WIDTH, [32], 1, (339, [2]))
