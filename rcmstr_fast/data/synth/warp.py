"""Geometry of a crop: arc, rotation and perspective as one mesh over the drawn word.

A point of the drawn word, in word heights from its centre, is bent along an arc and then mapped by a homography;
both have closed inverses, so that the mesh of the crop (each output cell names its source quad) is exact at its nodes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from rcmstr_fast.data.synth.config import Effects

#: Widest crop, in crop heights.
MAX_ASPECT = 16.0
#: Points of the upper and the lower edge of a word, in its widths and heights.
_EDGE = [(x / 6 - 0.5, y) for y in (-0.5, 0.5) for x in range(7)]
Point = tuple[float, float]
Row = tuple[float, float, float]
Homography = tuple[Row, Row, Row]


@dataclass(frozen=True)
class Warp:
    """Word to crop: horizontal stretch, signed curvature (1 / radius, in word heights), homography.

    A word needs some forty points: plain numbers are faster than arrays of that size.
    """

    stretch: float
    curvature: float
    homography: Homography

    def forward(self, points: Iterable[Point]) -> list[Point]:
        """Points (x, y) in word heights to crop coordinates, in word heights."""
        bent = [(x * self.stretch, y) for x, y in points]
        if self.curvature:
            radius = 1.0 / self.curvature
            polar = [(x * self.curvature, radius - y) for x, y in bent]
            bent = [(ray * math.sin(angle), radius - ray * math.cos(angle)) for angle, ray in polar]
        return _project(self.homography, bent)

    def inverse(self, points: Iterable[Point]) -> list[Point]:
        """The inverse of `forward`."""
        flat = _project(_adjugate(self.homography), points)
        if self.curvature:
            radius = 1.0 / self.curvature
            sign = math.copysign(1.0, radius)
            flat = [
                (radius * math.atan2(sign * x, sign * (radius - y)), radius - sign * math.hypot(x, radius - y))
                for x, y in flat
            ]
        return [(x / self.stretch, y) for x, y in flat]


def _project(homography: Homography, points: Iterable[Point]) -> list[Point]:
    (a, b, c), (d, e, f), (g, h, i) = homography
    return [((a * x + b * y + c) / (w := g * x + h * y + i), (d * x + e * y + f) / w) for x, y in points]


def _adjugate(homography: Homography) -> Homography:
    """The inverse but for a factor, which `_project` does not see."""
    (a, b, c), (d, e, f), (g, h, i) = homography
    return (
        (e * i - f * h, c * h - b * i, b * f - c * e),
        (f * g - d * i, a * i - c * g, c * d - a * f),
        (d * h - e * g, b * g - a * h, a * e - b * d),
    )


def draw_warp(rng: Random, effects: Effects, aspect: float) -> Warp:
    """A random warp for a word `aspect` times as wide as high."""
    chance, amount = ([rng.random() for _ in range(n)] for n in (4, 8))
    stretch = 0.7 + 0.6 * amount[0] if chance[0] < effects.stretch else 1.0
    stretch = min(stretch, 0.7 * MAX_ASPECT / aspect)  # room for margins and for what the homography adds
    width = aspect * stretch
    # The limits keep the word legible in a crop of fixed height: long words turn and bend less.
    angle = math.radians(12.0) * min(1.0, 2.5 / width) * (2 * amount[1] - 1) if chance[1] < effects.rotation else 0.0
    cos, sin = math.cos(angle), math.sin(angle)
    across, along, last = 0.0, 0.0, (0.0, 0.0, 1.0)
    if chance[2] < effects.perspective:
        across, along = 0.5 * (amount[2] - 0.5), 0.15 * (amount[3] - 0.5)
        last = (0.6 * (amount[4] - 0.5) / max(width, 1.0), 0.3 * (amount[5] - 0.5), 1.0)
    # A shear and perspective, then the rotation.
    homography = ((cos - sin * along, cos * across - sin, 0.0), (sin + cos * along, sin * across + cos, 0.0), last)
    curvature = 0.0
    if chance[3] < effects.curve and width > 2.0:
        bend = math.radians(25.0 + 75.0 * amount[6]) * min(1.0, 4.5 / width)
        curvature = math.copysign(bend / width, amount[7] - 0.5)
    return Warp(stretch, curvature, homography)


@dataclass(frozen=True)
class Placement:
    """A crop over a warped word: size in pixels, and where its origin lies in warped word heights."""

    height: int
    width: int
    left: float
    top: float
    scale: float


def place(warp: Warp, aspect: float, height: int, margins: tuple[float, float, float, float]) -> Placement:
    """The crop of a given height around the warped word.

    Args:
        warp: from word to crop.
        aspect: width of the drawn word over its height.
        height: of the crop in pixels.
        margins: left, top, right, bottom, in word heights; negative cuts into the word.
    """
    x, y = zip(*warp.forward((x * aspect, y) for x, y in _EDGE), strict=True)
    left, top, right, bottom = margins
    left, top = min(x) - left, min(y) - top
    scale = height / (max(y) + bottom - top)
    width = int(min(max(round((max(x) + right - left) * scale), 8), MAX_ASPECT * height))
    return Placement(height, width, left, top, scale)


def mesh(warp: Warp, at: Placement, centre: Point, word_height: float) -> list[tuple[tuple, tuple]]:
    """The argument of `Image.transform(..., Image.Transform.MESH, ...)`.

    Args:
        warp: from word to crop.
        at: the crop.
        centre: of the word in the source picture, pixels (x, y).
        word_height: of the word in the source picture, pixels.
    """
    turn = at.width / at.scale * abs(warp.curvature)
    columns = 2 + int(5 * turn) if warp.curvature else 1 + at.width // 100
    rows = 2 if warp.curvature else 1
    xs = [round(at.width * c / columns) for c in range(columns + 1)]
    ys = [round(at.height * r / rows) for r in range(rows + 1)]
    grid = [(x / at.scale + at.left, y / at.scale + at.top) for y in ys for x in xs]
    nodes = [(x * word_height + centre[0], y * word_height + centre[1]) for x, y in warp.inverse(grid)]
    lines = [nodes[r * (columns + 1) : (r + 1) * (columns + 1)] for r in range(rows + 1)]
    cells: list[tuple[tuple, tuple]] = []
    for (y0, y1), (upper, lower) in zip(pairwise(ys), pairwise(lines), strict=True):
        sides = zip(pairwise(xs), pairwise(upper), pairwise(lower), strict=True)
        cells += [((x0, y0, x1, y1), (*a, *b, *c, *d)) for (x0, x1), (a, d), (b, c) in sides]
    return cells
