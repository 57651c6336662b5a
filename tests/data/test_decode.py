"""decode_image: every colour mode to RGB of one size, everything else a BrokenImage with a reason."""

import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rcmstr_fast.data.decode import BrokenImage, decode_batch, decode_image, decode_picture, picture_size
from tests.data import raw_pictures

RAW = [("PNG", raw_pictures.pngs()), ("TIFF", raw_pictures.tiffs())]
LIMITS = {"max_pixels": 16_000_000, "min_side": 2}


def encoded(picture: Image.Image, format: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def decoded(data: bytes, height: int = 8, width: int = 16, **limits) -> np.ndarray:
    return decode_image(data, height, width, **(LIMITS | limits))


def gradient(mode: str = "RGB", size: tuple[int, int] = (16, 8)) -> Image.Image:
    width, height = size
    y, x = np.mgrid[:height, :width]
    values = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) * 5 % 256], axis=2)
    return Image.fromarray(values.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(format):
    result = decoded(encoded(gradient(), format, **({"lossless": True} if format == "WEBP" else {})))
    assert result.dtype == np.uint8 and result.flags.writeable
    assert (result == np.asarray(gradient())).all()


@pytest.mark.parametrize("mode", ["L", "1", "P"])
@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_grey_bilevel_and_palette(mode, format):
    picture = gradient(mode)
    assert (decoded(encoded(picture, format)) == np.asarray(picture.convert("RGB"))).all()


def test_jpeg_is_decoded_in_full_before_it_is_resized():
    data = encoded(gradient(size=(640, 320)), "JPEG")
    expected = Image.open(io.BytesIO(data)).resize((16, 8), Image.Resampling.BICUBIC)
    assert (decoded(data) == np.asarray(expected)).all()


def test_cmyk():
    assert (decoded(encoded(Image.new("CMYK", (16, 8), (0, 255, 255, 0)), "JPEG", quality=100)) - [255, 0, 0] < 3).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    half = Image.new(mode, (16, 8), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    half.paste((0, 0, 0, 255) if mode == "RGBA" else (0, 255), (8, 0, 16, 8))
    result = decoded(encoded(half))
    assert (result[:, :8] == 255).all() and (result[:, 8:] == 0).all()


def test_transparent_palette_entry_is_white():
    picture = Image.new("P", (16, 8), 0)
    picture.putpalette([9, 9, 9, 200, 0, 0])
    picture.paste(1, (8, 0, 16, 8))
    for format in ("PNG", "GIF"):
        result = decoded(encoded(picture, format, transparency=0))
        assert (result[:, :8] == 255).all() and (result[:, 8:] == [200, 0, 0]).all()


def test_sixteen_bits_are_scaled():
    values = np.linspace(0, 65535, 128).reshape(8, 16).astype(np.uint16)
    for format in ("PNG", "TIFF"):
        result = decoded(encoded(Image.fromarray(values), format))
        assert (result == np.rint(values / 257).astype(np.uint8)[..., None]).all()


def test_floating_point_is_zero_to_one():
    values = np.linspace(-0.5, 1.5, 128, dtype=np.float32).reshape(8, 16)
    values[0, 0] = np.nan
    result = decoded(encoded(Image.fromarray(values), "TIFF"))
    assert (result[..., 0] == np.rint(np.clip(np.nan_to_num(values) * 255, 0, 255))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    picture = gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (decoded(data, upright.height, upright.width) == np.asarray(upright)).all()


def test_damaged_exif_does_not_matter():
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40)
    assert (decoded(data) == decoded(encoded(gradient(), "JPEG"))).all()


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue")]
    for format, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert (decoded(data) == [255, 0, 0]).all(), format


def test_resize_is_bicubic_and_ignores_the_aspect():
    picture = gradient(size=(33, 70))
    expected = np.asarray(picture.resize((100, 32), Image.Resampling.BICUBIC))
    assert (decoded(encoded(picture), 32, 100) == expected).all()


def header_only_png(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return header + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "zero bytes"),
        (b"hello", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (encoded(gradient(size=(300, 200)), "JPEG")[:2000], "truncated"),
        (encoded(gradient(size=(300, 200)))[:200], "OSError"),
        (header_only_png(1, 50), "min_side=2"),
        (header_only_png(5000, 4000), "4000 x 5000 pixels, more than max_pixels=16000000"),
        (header_only_png(12_000, 10_000), "max_pixels"),
        (header_only_png(60_000, 60_000), "DecompressionBombError"),
        (header_only_png(0, 5), "0 pixels|min_side|picture|Error"),
        (encoded(gradient())[:20], "Error|not a picture"),
    ],
)
def test_broken_pictures_have_a_reason(data, reason):
    with pytest.raises(BrokenImage, match=reason):
        decoded(data)


@settings(max_examples=80, deadline=None)
@given(format=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), data=st.data())
def test_damaged_files_decode_or_are_broken(format, data):
    content = bytearray(encoded(gradient(), format))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decoded(bytes(content[: data.draw(st.integers(0, len(content)))])).shape == (8, 16, 3)
    except BrokenImage as error:
        assert str(error)


def test_no_warning_of_pillow_leaks(tmp_path):
    (tmp_path / "large.png").write_bytes(header_only_png(12_000, 10_000))
    code = (
        "import sys; from rcmstr_fast.data.decode import decode_image\n"
        "try: decode_image(open(sys.argv[1], 'rb').read(), 8, 8, max_pixels=10**9, min_side=1)\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-W", "always", "-c", code, str(tmp_path / "large.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout and "DecompressionBomb" not in done.stdout + done.stderr


@pytest.mark.parametrize("threads", [0, 3])
def test_batch(threads):
    items = [encoded(gradient(size=(10 + i, 9))) for i in range(40)]
    items[3], items[17] = None, b"nothing"
    pool = ThreadPoolExecutor(threads) if threads else None
    images, broken = decode_batch(items, 8, 16, **LIMITS, pool=pool)
    assert images.shape == (40, 8, 16, 3)
    assert broken == {3: "missing or unreadable record", 17: "not a picture (7 bytes)"}
    assert all((images[i] == decoded(items[i])).all() for i in range(40) if i not in broken)
    assert decode_batch([], 8, 16, **LIMITS)[0].shape == (0, 8, 16, 3)


@pytest.mark.parametrize(("name", "data"), [(f"{kind} {name}", data) for kind, files in RAW for name, data in files])
def test_every_depth_and_transparency_keeps_its_text(name, data):
    found = decoded(data, raw_pictures.HEIGHT, raw_pictures.WIDTH).astype(int)
    assert abs(found - raw_pictures.right()).max() <= 1


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "PA", "P"])
def test_webp_keeps_its_text(mode, lossless):
    text = Image.fromarray(raw_pictures.right()).resize((64, 32), Image.Resampling.NEAREST)
    picture = text.convert("RGBA" if mode == "PA" else mode)
    found = decoded(encoded(picture, "WEBP", lossless=lossless, quality=95), 32, 64).astype(int)
    assert abs(found - np.asarray(text)).mean() < (1 if lossless else 8)


@pytest.mark.parametrize("ground", ["white", "black"])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_text_on_nothing_is_laid_on_what_shows_it(ground, format):
    ink = (0, 0, 0, 255) if ground == "white" else (255, 255, 255, 255)
    picture = Image.new("RGBA", (16, 8), (*ink[:3], 0))
    picture.paste(ink, (4, 2, 12, 6))
    expected = Image.new("RGB", (16, 8), ground)
    expected.paste(ink[:3], (4, 2, 12, 6))
    options = {"lossless": True} if format == "WEBP" else {}
    assert (decoded(encoded(picture, format, **options)) == np.asarray(expected)).all()


@pytest.mark.parametrize("alpha", [255, 128, 0])
def test_a_veil_over_everything_changes_no_ground(alpha):
    picture = Image.fromarray(raw_pictures.right()).convert("RGBA")
    picture.putalpha(alpha)
    expected = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    assert (decoded(encoded(picture), *expected.size[::-1]) == np.asarray(expected)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_upright_picture(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(size=(20, 10)), "JPEG", exif=exif)
    assert picture_size(data) == decode_picture(data, **LIMITS).size == ((10, 20) if orientation > 4 else (20, 10))
    assert picture_size(b"nothing") is picture_size(b"") is picture_size(None) is None


@pytest.mark.parametrize(("height", "turned"), [(16, False), (23, False), (24, True), (60, True)])
def test_tall_pictures_are_turned_anticlockwise_where_ordered(height, turned):
    picture = gradient(size=(16, height))
    data = encoded(picture)
    upright = picture.resize((16, 8), Image.Resampling.BICUBIC)
    if turned:
        picture = Image.fromarray(np.rot90(np.asarray(picture)))
    expected = picture.resize((16, 8), Image.Resampling.BICUBIC)
    assert (decoded(data) == np.asarray(upright)).all()
    assert (decode_image(data, 8, 16, **LIMITS, rotate="tall") == np.asarray(expected)).all()
    assert (decode_batch([data], 8, 16, **LIMITS, rotate="tall")[0][0] == np.asarray(expected)).all()


def test_an_exif_turn_comes_before_tall_is_judged():
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side in the file
    picture = gradient(size=(30, 10))
    stored = picture.transpose(Image.Transpose.ROTATE_90)
    data = encoded(stored, exif=exif)
    assert (decode_image(data, 8, 16, **LIMITS, rotate="tall") == decoded(encoded(picture))).all()
