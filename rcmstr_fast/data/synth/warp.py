"""Geometry of a crop: arc, rotation and perspective as one mesh over the drawn word.

A point of the drawn word, in word heights from its centre, is bent along an arc and then mapped by a homography;
both have closed inverses, so that the mesh of the crop (each output cell names its source quad) is exact at its nodes.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rcmstr_fast.data.synth.config import Effects

#: Widest crop, in crop heights.
MAX_ASPECT = 16.0
#: Points of the upper and the lower edge of a word, in its widths and heights.
_EDGE = np.array([(x / 6 - 0.5, y) for y in (-0.5, 0.5) for x in range(7)])


@dataclass(frozen=True)
class Warp:
    """Word to crop: horizontal stretch, signed curvature (1 / radius, in word heights), homography [3, 3]."""

    stretch: float
    curvature: float
    homography: np.ndarray

    def forward(self, points: np.ndarray) -> np.ndarray:
        """[n, 2] float64 in word heights to crop coordinates, in word heights."""
        bent = points * (self.stretch, 1.0)
        if self.curvature:
            radius = 1.0 / self.curvature
            angle, ray = bent[:, 0] * self.curvature, radius - bent[:, 1]
            bent[:, 0] = ray * np.sin(angle)
            bent[:, 1] = radius - ray * np.cos(angle)
        return _project(self.homography, bent)

    def inverse(self, points: np.ndarray) -> np.ndarray:
        """The inverse of `forward`."""
        flat = _project(_adjugate(self.homography), points)
        if self.curvature:
            radius = 1.0 / self.curvature
            sign = math.copysign(1.0, radius)
            x, down = flat[:, 0].copy(), radius - flat[:, 1]
            flat[:, 0] = radius * np.arctan2(sign * x, sign * down)
            flat[:, 1] = radius - sign * np.hypot(x, down)
        flat[:, 0] /= self.stretch
        return flat


def _project(homography: np.ndarray, points: np.ndarray) -> np.ndarray:
    mapped = points @ homography[:, :2].T + homography[:, 2]
    return mapped[:, :2] / mapped[:, 2:]


def _adjugate(homography: np.ndarray) -> np.ndarray:
    """The inverse but for a factor, which `_project` does not see."""
    (a, b, c), (d, e, f), (g, h, i) = homography.tolist()
    return np.array([
        (e * i - f * h, c * h - b * i, b * f - c * e),
        (f * g - d * i, a * i - c * g, c * d - a * f),
        (d * h - e * g, b * g - a * h, a * e - b * d),
    ])  # fmt: skip


def draw_warp(rng: np.random.Generator, effects: Effects, aspect: float) -> Warp:
    """A random warp for a word `aspect` times as wide as high."""
    chance, amount = rng.random(4).tolist(), rng.random(8).tolist()
    stretch = 0.7 + 0.6 * amount[0] if chance[0] < effects.stretch else 1.0
    stretch = min(stretch, 0.7 * MAX_ASPECT / aspect)  # room for margins and for what the homography adds
    width = aspect * stretch
    # The limits keep the word legible in a crop of fixed height: long words turn and bend less.
    angle = math.radians(12.0) * min(1.0, 2.5 / width) * (2 * amount[1] - 1) if chance[1] < effects.rotation else 0.0
    homography = np.array(
        [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0], [0, 0, 1.0]]
    )
    if chance[2] < effects.perspective:
        shear = np.array([[1.0, 0.5 * (amount[2] - 0.5), 0.0], [0.15 * (amount[3] - 0.5), 1.0, 0.0], [0.0, 0.0, 1.0]])
        shear[2, 0] = 0.6 * (amount[4] - 0.5) / max(width, 1.0)
        shear[2, 1] = 0.3 * (amount[5] - 0.5)
        homography = homography @ shear
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


def place(warp: Warp, aspect: float, height: int, margins: np.ndarray) -> Placement:
    """The crop of a given height around the warped word.

    Args:
        warp: from word to crop.
        aspect: width of the drawn word over its height.
        height: of the crop in pixels.
        margins: left, top, right, bottom, in word heights; negative cuts into the word.
    """
    x, y = warp.forward(_EDGE * (aspect, 1.0)).T.tolist()
    left, top, right, bottom = margins.tolist()
    left, top = min(x) - left, min(y) - top
    scale = height / (max(y) + bottom - top)
    width = int(min(max(round((max(x) + right - left) * scale), 8), MAX_ASPECT * height))
    return Placement(height, width, left, top, scale)


def mesh(warp: Warp, at: Placement, centre: tuple[float, float], word_height: float) -> list[tuple[tuple, tuple]]:
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
    x = [round(at.width * c / columns) for c in range(columns + 1)]
    y = [round(at.height * r / rows) for r in range(rows + 1)]
    grid = np.array([(u, v) for v in y for u in x])
    source = warp.inverse(grid / at.scale + (at.left, at.top)) * word_height + centre
    nodes = source.reshape(rows + 1, columns + 1, 2)
    corners = nodes[:-1, :-1], nodes[1:, :-1], nodes[1:, 1:], nodes[:-1, 1:]
    quads = np.concatenate(corners, axis=2).reshape(-1, 8).tolist()
    boxes = [(x0, y0, x1, y1) for y0, y1 in pairwise(y) for x0, x1 in pairwise(x)]
    return list(zip(boxes, map(tuple, quads), strict=True))
