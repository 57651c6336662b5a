"""Losses against the rows of a batch, a row and a candidate at a time."""

import math

import numpy as np


def cross_entropy(row: np.ndarray, candidates: np.ndarray, positive: int, tau: float, skip: int = -1) -> float:
    """-log of the positive's share, over all candidates but `skip`."""
    similar = [math.exp(float(row @ other) / tau) for k, other in enumerate(candidates) if k != skip]
    return math.log(sum(similar)) - float(row @ candidates[positive]) / tau


def nce(one: np.ndarray, two: np.ndarray, tau: float) -> list[float]:
    """SeqCLR Eq. 1: its terms, for every row of both views."""
    rows, count = np.concatenate([one, two]), len(one)
    return [cross_entropy(row, rows, (i + count) % (2 * count), tau, skip=i) for i, row in enumerate(rows)]


def pixel_loss(prediction: np.ndarray, target: np.ndarray, hidden: np.ndarray, power: int = 2) -> float:
    """Mean over the hidden pixels and three colours of |difference| ** power."""
    total, count = 0.0, 0
    for b, _, y, x in zip(*np.nonzero(hidden), strict=True):
        for colour in range(3):
            total += abs(prediction[b, colour, y, x] - target[b, colour, y, x]) ** power
            count += 1
    return total / count
