"""Early warnings: what shows a collapse before a probe does."""

import torch
import torch.nn.functional as F
from torch import Tensor

#: Rows of a batch that are looked at.
MONITORED_ROWS = 256


def some_rows(rows: Tensor) -> Tensor:
    """[n] int64: at most MONITORED_ROWS evenly spaced rows of `rows` [M, ..]."""
    return torch.linspace(0, len(rows) - 1, min(len(rows), MONITORED_ROWS), device=rows.device).long()


@torch.no_grad()
def spread(unit_rows: Tensor) -> Tensor:
    """Standard deviation of a feature over unit rows [M, D], times sqrt(D), 0-d.

    1 for evenly spread directions, 0 when all rows have collapsed to one.
    """
    return unit_rows.std(dim=0, correction=0).mean() * unit_rows.shape[1] ** 0.5


@torch.no_grad()
def pair_accuracy(a: Tensor, b: Tensor) -> Tensor:
    """Share of (some) rows of a [M, D] whose nearest row of b [M, D] is their own partner, 0-d; rows have any length."""
    some = some_rows(a)
    similar = F.normalize(a[some], dim=1) @ F.normalize(b, dim=1).to(a.dtype).T
    return (similar.argmax(dim=1) == some).float().mean()


@torch.no_grad()
def detail(prediction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Standard deviation of the predicted hidden pixels over that of the true ones, 0-d: 0 where all are one grey.

    Args:
        prediction: [B, 3, H, W].
        target: [B, 3, H, W].
        hidden: [B, 1, H, W] bool.
    """
    count = (hidden.sum() * prediction.shape[1]).clamp(min=1)
    deviations = []
    for x in (prediction.float(), target.float()):
        mean = torch.where(hidden, x, 0.0).sum() / count
        deviations.append(torch.where(hidden, (x - mean) ** 2, 0.0).sum().div(count).sqrt())
    return deviations[0] / deviations[1].clamp(min=1e-6)


@torch.no_grad()
def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of the mean of distributions [M, K] over its largest value, 0-d: 0 where all rows name one class."""
    mean = probabilities.float().mean(dim=0)
    return -(mean * mean.clamp(min=1e-12).log()).sum() / torch.log(torch.tensor(float(len(mean)), device=mean.device))
