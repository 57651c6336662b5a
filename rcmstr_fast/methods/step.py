"""What goes into a pretraining step and what comes out; the collectives a method may use."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass
class StepBatch:
    """One micro-batch of this process.

    Attributes:
        views: [2, B, 3, H, W] float32, or bfloat16 under autocast to it; normalised; query view and key view.
        index: [B] int64; slot of each sample in the epoch, the key of its random choices.
        epoch: the epoch; int, or 0-d int64 tensor on the device (a recorded step reads it there).
        permuted: [B, 3, H, W] like views; the query view with its strips permuted by `permuted_order`, where it has been made
            together with the views; None: the method permutes it.
        order: [B, N] int64; `permuted_order`, where it has been drawn already; None: the method draws it.
        step_index: [A * B] int64; `index` of all A micro-batches of this process in the step; None: this is the only one.
    """

    views: Tensor
    index: Tensor
    epoch: int | Tensor
    permuted: Tensor | None = None
    order: Tensor | None = None
    step_index: Tensor | None = None


@dataclass
class StepOutput:
    """Result of a micro-batch.

    Attributes:
        loss: 0-d, with gradient.
        terms: every loss term by its name (DESIGN.md), 0-d, detached.
        monitors: contrastive accuracy and feature spread a level, 0-d; empty unless asked for.
        pictures: name -> [n, 3, H, W] float in [0, 1] for the contact sheet; empty unless asked for.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    monitors: dict[str, Tensor] = field(default_factory=dict)
    pictures: dict[str, Tensor] = field(default_factory=dict)


class Collectives(Protocol):
    """Exchange between the processes of a run; every process calls each in the same order."""

    rank: int
    world_size: int

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks along the first axis, in rank order, without gradient."""
        ...

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks, without gradient."""
        ...


class Local:
    """The collectives of a single process."""

    rank = 0
    world_size = 1

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


def full_precision(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x.float() if x.element_size() < 4 else x
