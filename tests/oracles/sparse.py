"""Masked convolution, pooling and site rules in float64 NumPy, site by site."""

import numpy as np


def conv2d(
    x: np.ndarray,
    weight: np.ndarray,
    active_in: np.ndarray,
    active_out: np.ndarray,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> np.ndarray:
    """x [B, C, h, w], weight [O, C, kh, kw], maps [B, h, w]: gathers active inputs at active outputs only."""
    out = np.zeros((x.shape[0], weight.shape[0], *active_out.shape[1:]))
    for b, i, j in zip(*np.nonzero(active_out)):
        for u in range(weight.shape[2]):
            for v in range(weight.shape[3]):
                row, column = i * stride[0] + u - padding[0], j * stride[1] + v - padding[1]
                inside = 0 <= row < x.shape[2] and 0 <= column < x.shape[3]
                if inside and active_in[b, row, column]:
                    out[b, :, i, j] += weight[:, :, u, v] @ x[b, :, row, column]
    return out


def max_pool2d(
    x: np.ndarray,
    active_in: np.ndarray,
    active_out: np.ndarray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> np.ndarray:
    out = np.zeros((*x.shape[:2], *active_out.shape[1:]))
    for b, i, j in zip(*np.nonzero(active_out)):
        top, left = i * stride[0] - padding[0], j * stride[1] - padding[1]
        seen = [
            x[b, :, row, column]
            for row in range(max(0, top), min(x.shape[2], top + kernel[0]))
            for column in range(max(0, left), min(x.shape[3], left + kernel[1]))
            if active_in[b, row, column]
        ]
        if seen:
            out[b, :, i, j] = np.max(seen, axis=0)
    return out


def windows(before: int, size: int, anchored: bool) -> list[set[int]]:
    """For each of `size` sites the sites of the axis before it that make it active."""
    if size == before + 1:
        return [{min(j, before - 1)} if anchored else {j - 1, j} & set(range(before)) for j in range(size)]
    if size == before - 1:
        return [{j} if anchored else {j, j + 1} for j in range(size)]
    return [set(range(j * before // size, (j + 1) * before // size)) for j in range(size)]


def carry(active: np.ndarray, size: tuple[int, int], rule: str) -> np.ndarray:
    """active [B, h0, w0] to [B, h, w]: rows by any, columns by the rule."""
    rows = windows(active.shape[1], size[0], anchored=False)
    columns = windows(active.shape[2], size[1], anchored=rule == "anchored")
    out = np.zeros((active.shape[0], *size), dtype=bool)
    for i, row_window in enumerate(rows):
        for j, column_window in enumerate(columns):
            out[:, i, j] = active[:, sorted(row_window)][:, :, sorted(column_window)].any(axis=(1, 2))
    return out
