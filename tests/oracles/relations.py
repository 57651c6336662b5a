"""Queue losses in float64 NumPy, row by row and in one pass over blocks of the queue."""

import numpy as np
from scipy.special import logsumexp


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - logsumexp(logits))


def info_nce(query: np.ndarray, key: np.ndarray, queue: np.ndarray, tau: float) -> float:
    """Mean over rows of -log(e^{q.p/tau} / (e^{q.p/tau} + sum_k e^{q.n_k/tau}))."""
    rows = []
    for q, p in zip(query, key):
        logits = np.concatenate([[q @ p], queue @ q]) / tau
        rows.append(logsumexp(logits) - logits[0])
    return float(np.mean(rows))


def info_gradient(q: np.ndarray, p: np.ndarray, queue: np.ndarray, tau: float) -> np.ndarray:
    """Gradient of one row of `info_nce` in its query: the expected candidate minus the positive, over tau."""
    candidates = np.concatenate([p[None], queue])
    return (softmax(candidates @ q / tau) @ candidates - p) / tau


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of two positive distributions."""
    return float(np.sum(p * (np.log(p) - np.log(q))))


def symmetric_kl(query: np.ndarray, key: np.ndarray, queue: np.ndarray, tau: float) -> float:
    """Mean over pairs of rows of the two-KL definition."""
    rows = []
    for q, p in zip(query, key):
        of_query, of_key = softmax(queue @ q / tau), softmax(queue @ p / tau)
        rows.append((divergence(of_key, of_query) + divergence(of_query, of_key)) / 2)
    return float(np.mean(rows))


class OnlineMean:
    """E_softmax(x)[value] over blocks, with a running maximum."""

    def __init__(self) -> None:
        self.maximum, self.total, self.weighted = -np.inf, 0.0, 0.0

    def add(self, logits: np.ndarray, values: np.ndarray) -> None:
        maximum = max(self.maximum, logits.max())
        scale = np.exp(self.maximum - maximum)
        weights = np.exp(logits - maximum)
        self.total = self.total * scale + weights.sum()
        self.weighted = self.weighted * scale + weights @ values
        self.maximum = maximum

    @property
    def mean(self) -> float:
        return self.weighted / self.total


def streaming_kl(q: np.ndarray, p: np.ndarray, queue: np.ndarray, tau: float, block: int) -> tuple[float, np.ndarray]:
    """One row by the identity (E_P[b-a] - E_Q[b-a]) / (2 tau), and its gradient in q, block by block."""
    under_key, under_query = OnlineMean(), OnlineMean()
    for start in range(0, len(queue), block):
        a, b = queue[start : start + block] @ q, queue[start : start + block] @ p
        under_key.add(b / tau, b - a)
        under_query.add(a / tau, b - a)
    gradient = np.zeros_like(q)
    for start in range(0, len(queue), block):
        rows = queue[start : start + block]
        a, b = rows @ q, rows @ p
        of_query = np.exp(a / tau - under_query.maximum) / under_query.total
        of_key = np.exp(b / tau - under_key.maximum) / under_key.total
        gradient += (of_query * (1 - (b - a - under_query.mean) / tau) - of_key) / (2 * tau) @ rows
    return (under_key.mean - under_query.mean) / (2 * tau), gradient
