"""Geometry of a crop: arc, rotation and perspective as one mesh over the drawn word.

A point of the drawn word, in word heights from its centre, is bent along an arc and then mapped by a homography;
both have closed inverses, so that the mesh of the crop (each output cell names its source quad) is exact at its nodes.
"""

import math
from dataclasses import dataclass

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
        x, y = points[:, 0] * self.stretch, points[:, 1]
        if self.curvature:
            radius = 1.0 / self.curvature
            angle = x * self.curvature
            x, y = (radius - y) * np.sin(angle), radius - (radius - y) * np.cos(angle)
        return _project(self.homography, x, y)

    def inverse(self, points: np.ndarray) -> np.ndarray:
        """The inverse of `forward`."""
        xy = _project(np.linalg.inv(self.homography), points[:, 0], points[:, 1])
        x, y = xy[:, 0], xy[:, 1]
        if self.curvature:
            radius = 1.0 / self.curvature
            sign = math.copysign(1.0, radius)
            angle = np.arctan2(sign * x, sign * (radius - y))
            x, y = radius * angle, radius - sign * np.hypot(x, radius - y)
        return np.stack([x / self.stretch, y], axis=1)


def _project(homography: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    h = homography
    w = h[2, 0] * x + h[2, 1] * y + h[2, 2]
    return np.stack([(h[0, 0] * x + h[0, 1] * y + h[0, 2]) / w, (h[1, 0] * x + h[1, 1] * y + h[1, 2]) / w], axis=1)


def draw_warp(rng: np.random.Generator, effects: Effects, aspect: float) -> Warp:
    """A random warp for a word `aspect` times as wide as high."""
    chance = rng.random(4)
    amount = rng.random(8)
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
    points = warp.forward(_EDGE * (aspect, 1.0))
    x, y = points.T.tolist()
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
    nodes = source.reshape(rows + 1, columns + 1, 2).tolist()
    cells = []
    for r in range(rows):
        for c in range(columns):
            quad = (*nodes[r][c], *nodes[r + 1][c], *nodes[r + 1][c + 1], *nodes[r][c + 1])
            cells.append(((x[c], y[r], x[c + 1], y[r + 1]), quad))
    return cells
