"""One crop: draw the word once, warp it once, lay it over a background, and age the picture."""

import math
from io import BytesIO
from pathlib import Path
from unicodedata import east_asian_width

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from rcmstr_fast.data.synth.backgrounds import (
    LUMINANCE,
    Bank,
    contrasting,
    cut,
    dark,
    draw_background,
    luminance,
    sheet,
)
from rcmstr_fast.data.synth.config import Effects, SynthConfig
from rcmstr_fast.data.synth.fonts import FontSet
from rcmstr_fast.data.synth.warp import draw_warp, mesh, place
from rcmstr_fast.data.synth.words import WordSource

#: Empty pixels around the drawn word: room for outline, shadow and interpolation.
_PAD = 8
#: Greatest standard deviation of a background's luminance; busier ones are calmed down to it.
_MAX_BUSY = 26.0


def _draw_text(text: str, fonts: FontSet, size: int, effects: Effects, rng: np.random.Generator) -> Image.Image:
    """The word in white on black (mode L) with `_PAD` empty pixels around its ink, or at least 0.45 sizes high."""
    chosen, letters = fonts.choose(text, rng), len(text)
    shaped = not text.isascii()
    font = fonts.load(chosen, size, shaped)
    apart = rng.random() < effects.spacing and all(c.isascii() or east_asian_width(c) == "W" for c in text)
    if apart and (spaces := fonts.narrow_spaces(chosen, size, shaped)):
        text = spaces[int(rng.random() * len(spaces))].join(text)
    canvas = Image.new("L", (int(size * (2 + 1.3 * letters + 0.35 * (len(text) - letters))), int(size * 2.2)))
    ImageDraw.Draw(canvas).text((size, size * 0.5), text, fill=255, font=font)
    left, top, right, bottom = canvas.getbbox() or (size, size, 2 * size, 2 * size)
    lacking = max(0, round(0.45 * size) - (bottom - top))  # marks such as . or - keep their surroundings
    top, bottom = top - lacking // 2, bottom + lacking - lacking // 2
    return canvas.crop((left - _PAD, top - _PAD, right + _PAD, bottom + _PAD))


def _thicken(letters: np.ndarray, radius: int) -> np.ndarray:
    """Greatest value of the (2 radius + 1)^2 neighbours [h, w] uint8."""
    for _ in range(radius):
        rows = letters.copy()
        np.maximum(rows[1:], letters[:-1], out=rows[1:])
        np.maximum(rows[:-1], letters[1:], out=rows[:-1])
        letters = rows.copy()
        np.maximum(letters[:, 1:], rows[:, :-1], out=letters[:, 1:])
        np.maximum(letters[:, :-1], rows[:, 1:], out=letters[:, :-1])
    return letters


def _layers(letters: Image.Image, effects: Effects, rng: np.random.Generator) -> Image.Image:
    """Letters alone (L), or letters, outline and shadow as the three channels of one picture."""
    outlined, shadowed = rng.random() < effects.outline, rng.random() < effects.shadow
    if not outlined and not shadowed:
        return letters
    pixels = np.asarray(letters)
    height, width = pixels.shape
    bands = np.zeros((height, 3, width), np.uint8)
    bands[:, 0] = thick = pixels
    if outlined:
        thick = _thicken(pixels, 2 if letters.height > 60 and rng.random() < 0.6 else 1)
        bands[:, 1] = thick
    if shadowed:
        far = min(1 + letters.height // 20, _PAD - 2)  # inside the margin, so that nothing is cut off
        dx, dy = (int((2 * rng.random() - 1) * (far + 1)) or far for _ in range(2))
        shifted = bands[max(dy, 0) : height + min(dy, 0), 2, max(dx, 0) : width + min(dx, 0)]
        shifted[:] = thick[max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)]
    return _of_lines(bands)


def _compose(
    masks: np.ndarray, ground: np.ndarray, effects: Effects, rng: np.random.Generator, *, paper: bool
) -> np.ndarray:
    """Colours chosen for contrast (`paper`: dark letters); shadow, outline and letters over the ground [3, h, w]
    float32 (changed)."""
    red, green, blue = ground[:, ::2, ::2]
    grey = (LUMINANCE[0] * red + LUMINANCE[1] * green + LUMINANCE[2] * blue).ravel()
    mean = float(grey.mean())
    grey -= mean
    busy = math.sqrt(float(grey @ grey) / grey.size)
    if busy > _MAX_BUSY:
        centre = ground.mean(axis=(1, 2), keepdims=True)
        ground *= _MAX_BUSY / busy
        ground += centre * (1 - _MAX_BUSY / busy)
        busy = _MAX_BUSY
    colour = contrasting(rng, mean, min(effects.min_contrast + busy, 120.0)) if not paper else dark(rng)
    own = luminance(colour)
    if len(masks) == 3:
        strength = np.float32(0.3 + 0.6 * rng.random())
        blend(ground, np.full(3, 0 if own > 100 else 255, np.float32), masks[2] * strength)
        blend(ground, contrasting(rng, own, effects.min_contrast), masks[1])
    blend(ground, colour, masks[0])
    if rng.random() < effects.shading:
        # Towards the far end of the scale, so that the contrast only grows.
        ramp = np.arange(ground.shape[1], dtype=np.float32)[:, None] * ((0.3 + 0.4 * rng.random()) / ground.shape[1])
        blend(ground, np.full(3, 255 if own > mean else 0, np.float32), masks[0] * ramp)
    return ground


def blend(ground: np.ndarray, colour: np.ndarray, mask: np.ndarray) -> None:
    """Lay a colour [3] over the ground [3, h, w] in place, as opaque as the mask [h, w] in [0, 1]."""
    ground *= 1 - mask
    ground += colour[:, None, None] * mask


def _light(picture: np.ndarray, bank: Bank, effects: Effects, rng: np.random.Generator) -> np.ndarray:
    """Uneven light, reduced contrast, and noise on a picture [3, h, w] in 0..255 (changed)."""
    height, width = picture.shape[1:]
    chance = rng.random(3).tolist()
    if chance[0] < effects.lighting:
        picture *= 1 + np.float32(0.35 * rng.random()) * cut(rng, bank.light, height, width)
    if chance[1] < effects.fade:
        keep = np.float32(0.5 + 0.45 * rng.random())
        picture *= keep
        picture += np.float32(255 * rng.random()) * (1 - keep)
    if chance[2] < effects.noise:
        strength = np.float32(2 + 10 * rng.random() ** 2)
        noise = cut(rng, bank.noise, height, width)
        picture += strength * (noise if rng.random() < 0.5 else noise[:1])
    return picture


def _soften(picture: Image.Image, effects: Effects, rng: np.random.Generator) -> Image.Image:
    """Motion and lack of focus, as one box blur (of variance ((2 r + 1)^2 - 1) / 12 for radius r)."""
    chance, amount = rng.random(2).tolist(), rng.random(3).tolist()
    scale = picture.height / 40
    radius = [0.0, 0.0]
    if chance[0] < effects.blur:
        sigma = scale * (0.3 + 1.0 * amount[0])
        radius = [(math.sqrt(1 + 12 * sigma**2) - 1) / 2] * 2
    if chance[1] < effects.motion:
        radius[0 if amount[1] < 0.7 else 1] += scale * (0.6 + 1.2 * amount[2])
    return picture.filter(ImageFilter.BoxBlur((radius[0], radius[1]))) if any(radius) else picture


def _planes(picture: Image.Image) -> np.ndarray:
    """[bands, h, w] float32 of a picture."""
    bands = len(picture.getbands())
    lines = np.frombuffer(picture.tobytes("raw", "RGB;L" if bands == 3 else "L"), np.uint8)
    return lines.reshape(picture.height, bands, picture.width).astype(np.float32).transpose(1, 0, 2)


def _of_lines(lines: np.ndarray) -> Image.Image:
    """RGB picture of [h, 3, w] uint8: line by line its red, its green and its blue, as Pillow copies it fastest."""
    height, _, width = lines.shape
    return Image.frombuffer("RGB", (width, height), lines, "raw", "RGB;L", 0, 1)


def _to_image(planes: np.ndarray) -> Image.Image:
    """[3, h, w] float32 to an RGB picture, clipped."""
    bands, height, width = planes.shape
    lines = np.empty((height, bands, width), np.uint8)
    lines.transpose(1, 0, 2)[:] = np.clip(planes, 0, 255, out=planes)
    return _of_lines(lines)


def render_word(
    text: str,
    rng: np.random.Generator,
    fonts: FontSet,
    bank: Bank,
    *,
    effects: Effects | None = None,
    heights: tuple[int, int] = (32, 48),
    photos: list[Path] | None = None,
    index: int = 0,
    seed: int = 0,
) -> Image.Image:
    """Render one word as it looks when cut tightly out of a photograph.

    Args:
        text: at least one character; one of the fonts must have them all.
        rng: decides everything that is random.
        fonts: to choose from.
        bank: textures and noise.
        effects: how often each effect is applied; None: the defaults.
        heights: lowest and greatest height of the crop in pixels.
        photos: pictures for backgrounds.
        index: number of the crop, which decides the photographs at hand.
        seed: of the choice of photographs.
    Returns:
        RGB picture, `heights[0]` to `heights[1]` pixels high, 8 pixels to 16 heights wide.
    Raises:
        ValueError: empty text, or no font can draw it.
    """
    if not text or text.isspace():
        raise ValueError(f"render_word: text must have a visible character, got {text!r}")
    effects = effects or Effects()
    height = heights[0] + int(rng.random() * (heights[1] - heights[0] + 1))
    # A camera with fewer pixels: everything is drawn smaller, and enlarged before the noise.
    coarse = rng.random() < effects.low_resolution
    drawn = max(12, round(height / (1.3 + 1.4 * rng.random()))) if coarse else height
    # Letters are drawn at about the size they have in the crop, of which the ink is a smaller part in lower case.
    size = max(24, round(drawn * (1.2 if text.islower() or text.isupper() else 1.1) / 8) * 8)
    letters = _draw_text(text, fonts, size, effects, rng)
    word_height, word_width = letters.height - 2 * _PAD, letters.width - 2 * _PAD
    aspect = word_width / word_height
    warp = draw_warp(rng, effects, aspect)
    margins = 0.22 * rng.random(4) ** 1.5 - 0.02
    margins[[0, 2]] *= 1.5
    at = place(warp, aspect, drawn, margins)
    source = _layers(letters, effects, rng)
    centre = (source.width / 2, source.height / 2)
    cells = mesh(warp, at, centre, word_height)
    warped = source.transform((at.width, at.height), Image.Transform.MESH, cells, Image.Resampling.BILINEAR)
    masks = _planes(warped)
    masks *= np.float32(1 / 255)
    paper, place_on = rng.random() >= effects.colour, (at.height, at.width)
    if paper:
        ground = sheet(rng, bank, place_on, effects)
    else:
        ground = draw_background(rng, bank, photos or [], index, seed, place_on, effects)
    picture = _soften(_to_image(_compose(masks, ground, effects, rng, paper=paper)), effects, rng)
    if coarse:
        kind = Image.Resampling.BICUBIC if rng.random() < 0.6 else Image.Resampling.BILINEAR
        picture = picture.resize((max(8, round(at.width * height / drawn)), height), kind)
    return _to_image(_light(_planes(picture), bank, effects, rng))


class Renderer:
    """Crop i of a request; the same in every process.

    Args:
        config: the request.
        words: its texts.
        fonts: its fonts.
        photos: its photographs.
    """

    def __init__(self, config: SynthConfig, words: WordSource, fonts: FontSet, photos: list[Path]) -> None:
        self._config, self._words, self._fonts, self._photos = config, words, fonts, photos
        self._bank = Bank(config.seed)

    def __call__(self, index: int) -> tuple[bytes, str]:
        """JPEG bytes and label of crop `index`, a function of (seed, index)."""
        config = self._config
        rng = np.random.default_rng((config.seed, index))
        text = self._words.draw(rng)
        picture = render_word(
            text, rng, self._fonts, self._bank, effects=config.effects,
            heights=(config.height_min, config.height_max), photos=self._photos, index=index, seed=config.seed,
        )  # fmt: skip
        effects = config.effects
        quality = effects.jpeg_min + int(rng.random() * (effects.jpeg_max - effects.jpeg_min + 1))
        encoded = BytesIO()
        picture.save(encoded, "JPEG", quality=quality)
        return encoded.getvalue(), text
