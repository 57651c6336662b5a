"""Heads in float64 NumPy, image by image, from a state dict."""

import math

import numpy as np


def weights(module) -> dict[str, np.ndarray]:
    return {name: x.detach().double().numpy() for name, x in module.state_dict().items()}


def linear(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def group_norm(x: np.ndarray, w: dict[str, np.ndarray], name: str, group: int) -> np.ndarray:
    """Batch norm of [B, n, C] whose statistics are those of `group` images."""
    out = np.empty_like(x)
    for start in range(0, len(x), group):
        rows = x[start : start + group].reshape(-1, x.shape[2])
        normed = (rows - rows.mean(0)) / np.sqrt(((rows - rows.mean(0)) ** 2).mean(0) + 1e-5)
        out[start : start + group] = normed.reshape(-1, *x.shape[1:])
    return out * w.get(f"{name}.weight", 1.0) + w.get(f"{name}.bias", 0.0)


def mlp(x: np.ndarray, w: dict[str, np.ndarray], prefix: str, layers: str, group: int = 0) -> np.ndarray:
    """Layers of a Sequential by letters: L linear, N batch norm, R ReLU, G GELU."""
    for place, kind in enumerate(layers):
        name = f"{prefix}{place}"
        if kind == "L":
            x = linear(x, w, name)
        elif kind == "N":
            x = group_norm(x, w, name, group)
        elif kind == "R":
            x = np.where(x > 0, x, 0.0)
        else:
            x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x


def windows(frames: np.ndarray, count: int) -> np.ndarray:
    """Adaptive averages of [T, C]: window s is from floor(s T / n) to ceil((s + 1) T / n)."""
    steps = len(frames)
    return np.stack(
        [frames[math.floor(s * steps / count) : math.ceil((s + 1) * steps / count)].mean(0) for s in range(count)]
    )


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))
