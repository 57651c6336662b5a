"""One crop: draw the word once, warp it once, lay it over a background, and age the picture."""

import math
from io import BytesIO
from pathlib import Path
from random import Random
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
    to_lines,
)
from rcmstr_fast.data.synth.config import Effects, SynthConfig
from rcmstr_fast.data.synth.fonts import FontSet
from rcmstr_fast.data.synth.warp import draw_warp, mesh, place
from rcmstr_fast.data.synth.words import WordSource

#: Empty pixels around the drawn word: room for outline, shadow and interpolation.
_PAD = 8
#: Greatest standard deviation of a background's luminance; busier ones are calmed down to it.
_MAX_BUSY = 26.0


def _draw_text(text: str, fonts: FontSet, size: int, effects: Effects, rng: Random) -> Image.Image:
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


def _layers(letters: Image.Image, effects: Effects, rng: Random) -> Image.Image:
    """Letters alone (L), or letters, outline and shadow as the three channels of one picture."""
    outlined, shadowed = rng.random() < effects.outline, rng.random() < effects.shadow
    if not outlined and not shadowed:
        return letters
    pixels = np.asarray(letters)
    height, width = pixels.shape
    lines = np.zeros((height, 3, width), np.uint8)
    lines[:, 0] = thick = pixels
    if outlined:
        thick = _thicken(pixels, 2 if letters.height > 60 and rng.random() < 0.6 else 1)
        lines[:, 1] = thick
    if shadowed:
        far = min(1 + letters.height // 20, _PAD - 2)  # inside the margin, so that nothing is cut off
        dx, dy = (int((2 * rng.random() - 1) * (far + 1)) or far for _ in range(2))
        shifted = lines[max(dy, 0) : height + min(dy, 0), 2, max(dx, 0) : width + min(dx, 0)]
        cast = thick[max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)]
        np.multiply(cast, np.float32(0.3 + 0.6 * rng.random()), out=shifted, casting="unsafe")
    return _of_lines(lines)


def _compose(masks: Image.Image, ground: np.ndarray, effects: Effects, rng: Random, *, paper: bool) -> Image.Image:
    """Colours chosen for contrast (`paper`: dark letters); shadow, outline and letters over the ground [h, 3, w]
    float32 (changed)."""
    some = ground[1::3, :, 1::3].transpose(1, 0, 2).reshape(3, -1)
    centre = some.sum(axis=1) / some.shape[1]
    mean, grey = luminance(centre), LUMINANCE @ some
    busy = math.sqrt(max(float(grey @ grey) / grey.size - mean**2, 0.0))
    if busy > _MAX_BUSY:
        ground *= np.float32(_MAX_BUSY / busy)
        ground += (centre * np.float32(1 - _MAX_BUSY / busy))[:, None]
        busy = _MAX_BUSY
    colour = contrasting(rng, mean, min(effects.min_contrast + busy, 120.0)) if not paper else dark(rng)
    own = luminance(colour)
    picture = _to_image(ground)
    letters, *behind = masks.split()
    if behind:
        outline, shadow = behind
        picture.paste((0, 0, 0) if own > 100 else (255, 255, 255), None, shadow)
        picture.paste(_paint(contrasting(rng, own, effects.min_contrast)), None, outline)
    if rng.random() < effects.shading:
        # Towards the far end of the scale, so that the contrast only grows.
        ramp = np.arange(picture.height, dtype=np.float32)[:, None] * ((0.3 + 0.4 * rng.random()) / picture.height)
        shades = colour + ((255 if own > mean else 0) - colour) * ramp
        column = Image.frombuffer("RGB", (1, picture.height), (shades + 0.5).astype(np.uint8), "raw", "RGB", 0, 1)
        picture.paste(column.resize(picture.size, Image.Resampling.NEAREST), None, letters)
    else:
        picture.paste(_paint(colour), None, letters)
    return picture


def _paint(colour: np.ndarray) -> tuple[int, ...]:
    """A colour [3] as Pillow takes it."""
    return tuple(int(value + 0.5) for value in colour.tolist())


def _light(picture: Image.Image, bank: Bank, effects: Effects, rng: Random) -> Image.Image:
    """Uneven light, reduced contrast, and noise."""
    lit, faded, noisy = (rng.random() < share for share in (effects.lighting, effects.fade, effects.noise))
    if not (lit or faded or noisy):
        return picture
    lines, (width, height) = to_lines(picture), picture.size
    keep = 0.5 + 0.45 * rng.random() if faded else 1.0
    gain: np.ndarray | np.float32 = np.float32(keep)
    if lit:
        gain = gain + np.float32(0.35 * keep * rng.random()) * cut(rng, bank.light, height, width)
    values = lines * gain
    if faded:
        values += np.float32(255 * rng.random() * (1 - keep))
    if noisy:
        strength = np.float32(2 + 10 * rng.random() ** 2)
        noise = cut(rng, bank.noise, height, width)
        values += strength * (noise if rng.random() < 0.5 else noise[:, :1])
    return _to_image(values)


def _soften(picture: Image.Image, effects: Effects, rng: Random) -> Image.Image:
    """Motion and lack of focus, as one box blur (of variance ((2 r + 1)^2 - 1) / 12 for radius r)."""
    scale = picture.height / 40
    radius = [0.0, 0.0]
    if rng.random() < effects.blur:
        sigma = scale * (0.3 + 1.0 * rng.random())
        radius = [(math.sqrt(1 + 12 * sigma**2) - 1) / 2] * 2
    if rng.random() < effects.motion:
        radius[0 if rng.random() < 0.7 else 1] += scale * (0.6 + 1.2 * rng.random())
    return picture.filter(ImageFilter.BoxBlur((radius[0], radius[1]))) if any(radius) else picture


def _of_lines(lines: np.ndarray) -> Image.Image:
    """The RGB picture of [h, 3, w] uint8 (see `to_lines`)."""
    height, _, width = lines.shape
    return Image.frombuffer("RGB", (width, height), lines, "raw", "RGB;L", 0, 1)


def _to_image(lines: np.ndarray) -> Image.Image:
    """[h, 3, w] float32 (changed) to an RGB picture, clipped to 0..255."""
    np.minimum(lines, 255, out=lines)
    np.maximum(lines, 0, out=lines)
    return _of_lines(lines.astype(np.uint8))


def render_word(
    text: str,
    rng: Random,
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
    left, top, right, bottom = (0.22 * rng.random() ** 1.5 - 0.02 for _ in range(4))
    at = place(warp, aspect, drawn, (1.5 * left, top, 1.5 * right, bottom))
    source = _layers(letters, effects, rng)
    centre = (source.width / 2, source.height / 2)
    cells = mesh(warp, at, centre, word_height)
    warped = source.transform((at.width, at.height), Image.Transform.MESH, cells, Image.Resampling.BILINEAR)
    paper, place_on = rng.random() >= effects.colour, (at.height, at.width)
    if paper:
        ground = sheet(rng, bank, place_on, effects)
    else:
        ground = draw_background(rng, bank, photos or [], index, seed, place_on, effects)
    picture = _soften(_compose(warped, ground, effects, rng, paper=paper), effects, rng)
    if coarse:
        kind = Image.Resampling.BICUBIC if rng.random() < 0.6 else Image.Resampling.BILINEAR
        picture = picture.resize((max(8, round(at.width * height / drawn)), height), kind)
    return _light(picture, bank, effects, rng)


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
        rng = Random(f"{config.seed} {index}")
        text = self._words.draw(rng)
        picture = render_word(
            text,
            rng,
            self._fonts,
            self._bank,
            effects=config.effects,
            heights=(config.height_min, config.height_max),
            photos=self._photos,
            index=index,
            seed=config.seed,
        )
        effects = config.effects
        quality = effects.jpeg_min + int(rng.random() * (effects.jpeg_max - effects.jpeg_min + 1))
        encoded = BytesIO()
        picture.save(encoded, "JPEG", quality=quality)
        return encoded.getvalue(), text
