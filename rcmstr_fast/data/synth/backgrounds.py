"""Backgrounds of crops: flat, running colours, textures, clutter, and pieces of photographs.

Textures, clutter and noise are made once a process from the seed alone and cut at random places.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, UnidentifiedImageError

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.synth.config import Effects

_HEIGHT, _WIDTH = 160, 896
_PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
#: Crops i with the same i // PHOTO_BLOCK share PHOTOS photographs, so that few are decoded and few are held.
PHOTO_BLOCK, PHOTOS = 1024, 24
#: Weights of red, green and blue.
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
_log = logging.getLogger(__name__)


def cut(rng: Random, bank: Sequence[np.ndarray] | np.ndarray, height: int, width: int) -> np.ndarray:
    """A random window [height, C, width] of a random entry [H, C, W] of a bank, mirrored or not; tiled if small."""
    entry = bank[int(rng.random() * len(bank))]
    below, right = height - entry.shape[0], width - entry.shape[2]
    if below > 0 or right > 0:
        entry = np.pad(entry, [(0, max(below, 0)), (0, 0), (0, max(right, 0))], "symmetric")
    y = int(rng.random() * (entry.shape[0] - height + 1))
    x = int(rng.random() * (entry.shape[2] - width + 1))
    window = entry[y : y + height, :, x : x + width]
    return window[..., ::-1] if rng.random() < 0.5 else window


def _fractal(rng: np.random.Generator, slope: float, squeeze: float) -> np.ndarray:
    """Noise whose spectrum falls with frequency^-slope; `squeeze` > 1 draws it out along the rows."""
    fy = np.fft.fftfreq(_HEIGHT)[:, None]
    fx = np.fft.rfftfreq(_WIDTH)[None] * squeeze
    radius = np.maximum(np.hypot(fx, fy), 1.0 / 256)
    spectrum = np.fft.rfft2(rng.standard_normal((_HEIGHT, _WIDTH))) / radius**slope
    picture = np.fft.irfft2(spectrum, s=(_HEIGHT, _WIDTH))
    return ((picture - picture.mean()) / (2 * picture.std())).clip(-1, 1)


def _pattern(rng: np.random.Generator, kind: int) -> np.ndarray:
    """A texture [H, W] in [-1, 1]."""
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH].astype(np.float64)
    if kind == 0:  # grain, plaster, cloud
        return _fractal(rng, rng.uniform(0.6, 2.0), 1.0)
    if kind == 1:  # wood, brushed metal
        return _fractal(rng, rng.uniform(0.8, 1.6), rng.uniform(6, 20))
    if kind == 2:  # stains and shadows of leaves
        return np.tanh(6 * (_fractal(rng, 2.0, 1.0) + rng.uniform(-0.3, 0.3)))
    soft = _fractal(rng, 1.5, 1.0)
    if kind == 3:  # stripes
        turn, period = rng.uniform(0, np.pi), rng.uniform(8, 40)
        wave = np.sin((x * np.cos(turn) + y * np.sin(turn)) * 2 * np.pi / period + 0.4 * soft)
        return np.tanh(wave * rng.uniform(0.8, 6)) * 0.8 + 0.2 * soft
    # bricks and tiles: joints between rows shifted by half a brick
    high, wide = rng.uniform(14, 40), rng.uniform(24, 90)
    row = np.floor(y / high)
    joint = ((y % high) < 2) | (((x + (row % 2) * wide / 2) % wide) < 2)
    shade = rng.uniform(-0.5, 0.5, (64, 64))[row.astype(int) % 64, np.floor(x / wide).astype(int) % 64]
    return np.where(joint, -1.0, shade) * 0.8 + 0.2 * soft


def _clutter(rng: np.random.Generator) -> np.ndarray:
    """Blurred coloured shapes on each other [H, 3, W] uint8."""
    colours = Random(int(rng.integers(2**63)))
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), _paint(colours))
    draw = ImageDraw.Draw(picture)
    for _ in range(220):
        x, y = rng.uniform(-20, _WIDTH), rng.uniform(-20, _HEIGHT)
        w, h = rng.uniform(5, 110), rng.uniform(4, 60)
        colour = _paint(colours)
        shape = rng.integers(3)
        if shape == 0:
            draw.rectangle((x, y, x + w, y + h), fill=colour)
        elif shape == 1:
            draw.ellipse((x, y, x + w, y + h), fill=colour)
        else:
            end = (x + rng.uniform(-150, 150), y + rng.uniform(-90, 90))
            draw.line((x, y, *end), fill=colour, width=int(rng.integers(1, 9)))
    return to_lines(picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.8, 6)))))


def _paint(rng: Random) -> tuple[int, ...]:
    """A muted colour, as surfaces have."""
    return tuple(int(c) for c in 128 + 0.75 * (_colour(rng, 0.5) - 128))


def to_lines(picture: Image.Image) -> np.ndarray:
    """[h, 3, w] uint8 of an RGB picture, line by line its red, its green and its blue; read only.

    Everything is computed in this layout: Pillow copies it fastest, and a map [h, 1, w] applies to the three at once.
    """
    lines = np.frombuffer(picture.tobytes("raw", "RGB;L"), np.uint8)
    return lines.reshape(picture.height, 3, picture.width)


class Bank:
    """Everything made beforehand: textures [20, H, 1, W], light [4, H, 1, W], noise [2, H, 3, W] float32,
    clutter [8, H, 3, W] uint8."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng((seed, 2**63))  # crops take (seed, i), i below 2^63
        self.textures = np.stack([_pattern(rng, i % 5) for i in range(20)]).astype(np.float32)[:, :, None]
        self.noise = rng.standard_normal((2, _HEIGHT, 3, _WIDTH), dtype=np.float32)
        self.light = np.stack([_fractal(rng, 2.5, 1.0) for _ in range(4)]).astype(np.float32)[:, :, None]
        self.clutter = np.stack([_clutter(rng) for _ in range(8)])


def find_photos(folder: str) -> list[Path]:
    """The photographs of a folder, in a fixed order.

    Raises:
        ConfigError: no such folder, or no picture in it.
    """
    if not folder:
        return []
    if not Path(folder).is_dir():
        raise ConfigError(f"data synth: backgrounds must be a folder of pictures, got {folder!r}")
    photos = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _PICTURES and path.is_file())
    if not photos:
        raise ConfigError(f"data synth: backgrounds must hold pictures, found none in {folder!r}")
    return photos


@lru_cache(maxsize=2 * PHOTOS)
def _photo(path: Path) -> np.ndarray | None:
    """A photograph at no more than about 640 pixels a side, at least a bank entry's height; None if undecodable."""
    try:
        with Image.open(BytesIO(path.read_bytes())) as picture:
            picture.draft("RGB", (640, 640))
            rgb = picture.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        _log.warning("background %s cannot be decoded and is not used: %s", path, error)
        return None
    scale = max(640 / max(rgb.size), 64 / min(rgb.size))
    size = (min(4096, round(rgb.width * scale)), min(4096, round(rgb.height * scale)))
    return to_lines(rgb.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))


def luminance(colour: np.ndarray) -> float:
    """Luminance of a colour [3], in its unit."""
    return float(LUMINANCE @ colour)


def _colour(rng: Random, vivid: float = 1.0) -> np.ndarray:
    """A colour [3] float32 in 0..255: half of them nearly grey, the others of any hue, rarely violet."""
    kind, first, *u = (rng.random() for _ in range(5))
    if kind < 0.45:
        channels = [min(max(255 * first + 16 * (v - 0.5), 0.0), 255.0) for v in u]
    else:
        hue = 4.4 * first if u[1] < 0.9 else 6 * first
        saturation, value = vivid * (0.25 + 0.7 * u[0]), 255 * (0.2 + 0.8 * u[2])
        wheel = (min(max(abs((hue + turn) % 6 - 3) - 1, 0.0), 1.0) for turn in (0, 4, 2))
        channels = [value * (1 - saturation * (1 - w)) for w in wheel]
    return np.array(channels, dtype=np.float32)


def contrasting(rng: Random, mean: float, distance: float) -> np.ndarray:
    """A random colour whose luminance is at least `distance` (up to 127) from `mean`."""
    colour = _colour(rng)
    now = luminance(colour)
    if abs(now - mean) >= distance:
        return colour
    above, below = 255 - mean - distance, mean - distance
    bright = above >= 0 if below < 0 else (above >= 0 and rng.random() * (above + below) < above)
    distance += 0.6 * max(above if bright else below, 0.0) * rng.random()
    target = mean + distance if bright else mean - distance
    # Mixed with white or black until it has the luminance wanted.
    if now > target:
        return colour * np.float32(target / now)
    return colour + (255 - colour) * np.float32((target - now) / max(255 - now, 1e-3))


def draw_background(
    rng: Random,
    bank: Bank,
    photos: list[Path],
    index: int,
    seed: int,
    size: tuple[int, int],
    effects: Effects,
) -> np.ndarray:
    """A background [height, 3, width] float32 in 0..255; `index` chooses which photographs are at hand."""
    height, width = size
    chance = [rng.random() for _ in range(4)]
    if photos and chance[0] < effects.photo:
        few = np.random.default_rng((seed, 2**62 + index // PHOTO_BLOCK)).integers(len(photos), size=PHOTOS)
        photo = _photo(photos[few[int(rng.random() * PHOTOS)]])
        if photo is not None:
            return cut(rng, [photo], height, width).astype(np.float32)
    if chance[1] < effects.clutter:
        picture = cut(rng, bank.clutter, height, width).astype(np.float32)
    else:
        picture = np.empty((height, 3, width), np.float32)
        picture[:] = _colour(rng, 0.8)[:, None]
        if chance[2] < effects.gradient:
            step, turn = (_colour(rng, 0.8) - picture[0, :, 0])[:, None], rng.random() * 2 * np.pi
            down = np.arange(height, dtype=np.float32) * (np.sin(turn) / height)
            picture += step * (down[:, None, None] + np.arange(width, dtype=np.float32) * (np.cos(turn) / width))
            np.clip(picture, 0, 255, out=picture)
    if chance[3] < effects.texture:
        strength = 8 + 40 * rng.random()
        tint = np.array([strength + 20 * (rng.random() - 0.5) for _ in range(3)], np.float32)
        picture += cut(rng, bank.textures, height, width) * tint[:, None]
    return picture


def sheet(rng: Random, bank: Bank, size: tuple[int, int], effects: Effects) -> np.ndarray:
    """Light grey paper [height, 3, width] float32 in 0..255."""
    paper = np.full((size[0], 3, size[1]), 200 + 55 * rng.random(), np.float32)
    if rng.random() < effects.texture:
        paper += cut(rng, bank.textures, *size) * np.float32(4 + 12 * rng.random())
    return paper


def dark(rng: Random) -> np.ndarray:
    """The dark grey [3] float32 of print, in 0..255."""
    return np.full(3, 80 * rng.random(), np.float32)
