"""predictions.png: some words of the test sets with what was read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_SCALE, _TEXT, _GAP, _COLUMNS = 2, 44, 8, 4
_RIGHT, _WRONG, _INK = (20, 120, 60), (190, 30, 40), (60, 60, 60)


@dataclass(frozen=True)
class Reading:
    """One word as it was read.

    Attributes:
        image: [H, W, 3] uint8.
        label: the word, as the protocol compares it.
        prediction: what was read, as the protocol compares it.
        confidence: of the prediction, in [0, 1].
    """

    image: np.ndarray
    label: str
    prediction: str
    confidence: float

    @property
    def correct(self) -> bool:
        """The two strings are the same."""
        return self.label == self.prediction


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Shorten a text to a width in pixels."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def contact_sheet(readings: Sequence[Reading]) -> Image.Image:
    """The words in rows, wrong ones first, each over its label and its prediction with confidence.

    Characters the built-in font lacks show as boxes; predictions.tsv has the exact strings.

    Args:
        readings: at least one, all images of one size.
    Returns:
        An RGB picture; predictions are green where right and red where wrong.
    """
    readings = sorted(readings, key=lambda reading: reading.correct)
    height, width = (side * _SCALE for side in readings[0].image.shape[:2])
    columns = min(_COLUMNS, len(readings))
    rows = -(-len(readings) // columns)
    cell_width, cell_height = width + _GAP, height + _TEXT + _GAP
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for i, reading in enumerate(readings):
        x, y = _GAP + i % columns * cell_width, _GAP + i // columns * cell_height
        word = Image.fromarray(np.ascontiguousarray(reading.image))
        sheet.paste(word.resize((width, height), Image.Resampling.BICUBIC), (x, y))
        draw.text((x, y + height), _fit(draw, reading.label, font, width), fill=_INK, font=font)
        tail = f"  {100 * reading.confidence:.0f} %"
        read = _fit(draw, reading.prediction or "(nothing)", font, width - int(draw.textlength(tail, font=font)))
        draw.text((x, y + height + 20), read + tail, fill=_RIGHT if reading.correct else _WRONG, font=font)
    return sheet
