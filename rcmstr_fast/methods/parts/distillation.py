"""Self-distillation: scores over learned prototypes, and the centre that keeps a teacher from naming one alone."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.methods.protocol import Collectives
from rcmstr_fast.ops.precision import full_precision


class PrototypeHead(nn.Module):
    """Three linear layers with GELU, unit length, and a last layer of unit rows (DINO, iBOT).

    Args:
        channels: of a token.
        hidden: width of the two layers between.
        bottleneck: channels before the last layer.
        prototypes: rows of the last layer.
    """

    def __init__(self, channels: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        sizes = (channels, hidden, hidden, bottleneck)
        layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.layers = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[.., C]` to unit rows `[.., bottleneck]`."""
        return F.normalize(full_precision(self.layers(tokens)), dim=-1)

    def scores(self, rows: Tensor, moving: Tensor | float = 1.0) -> Tensor:
        """Rows `[.., bottleneck]` to scores `[.., prototypes]`.

        Args:
            rows: of `forward`, or means of such.
            moving: 0 or 1; with 0 the last layer gets a gradient of zeros.
        """
        held = self.prototypes.detach()
        weight = held + moving * (self.prototypes - held)
        return full_precision(F.linear(rows, F.normalize(weight, dim=1)))


def cross_entropy(teacher: Tensor, student: Tensor) -> Tensor:
    """-sum over prototypes of p log q.

    Args:
        teacher: [.., K] probabilities p.
        student: [.., K] scores over the temperature; q is their softmax.
    Returns:
        [..].
    """
    return -(teacher * F.log_softmax(student, dim=-1)).sum(-1)


class Centre(nn.Module):
    """A slow mean of a teacher's scores, which is taken off them.

    Args:
        prototypes: K.
        momentum: share that stays at each step.
        collectives: exchange with the other processes.
    """

    def __init__(self, prototypes: int, momentum: float, collectives: Collectives) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(prototypes))
        self._momentum, self._collectives = momentum, collectives
        self._seen: list[Tensor] = []

    def begin(self) -> None:
        """A step begins."""
        self._seen = []

    def note(self, mean: Tensor) -> None:
        """Mean scores [K] of a micro-batch."""
        self._seen.append(mean)

    @torch.no_grad()
    def move(self, finite: Tensor | None) -> None:
        """Follow the scores noted in this step by all processes, where it was finite."""
        seen = self._collectives.mean(torch.stack(self._seen).mean(0)).to(self.mean.dtype)
        moved = self._momentum * self.mean + (1 - self._momentum) * seen
        self.mean.copy_(moved if finite is None else torch.where(finite, moved, self.mean))
        self._seen = []
