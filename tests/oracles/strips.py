"""Strips and pooling windows in NumPy, place by place."""

import numpy as np


def permute(images: np.ndarray, order: np.ndarray) -> np.ndarray:
    """images [B, C, H, W], order [B, N]: place n of image b shows strip order[b, n]."""
    out = np.empty_like(images)
    places = order.shape[1]
    width = images.shape[3] // places
    for b in range(order.shape[0]):
        for n in range(places):
            image, strip = divmod(int(order[b, n]), places)
            shown = images[image, :, :, strip * width : (strip + 1) * width]
            out[b, :, :, n * width : (n + 1) * width] = shown
    return out


def pooling_windows(frames: int, count: int) -> list[tuple[int, int]]:
    """Half-open windows of adaptive averaging."""
    return [(s * frames // count, -(-(s + 1) * frames // count)) for s in range(count)]
