"""What goes into a pretraining step and what comes out; the collectives a method may use."""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from rcmstr_fast.ops.precision import full_precision as full_precision


@dataclass
class Batch:
    """One micro-batch of this process.

    Attributes:
        views: name of a `ViewSpec` -> [B, 3, H, W] float32 (float64 in a run of that precision, bfloat16 under
            autocast to it), normalised to [-1, 1].
        index: [B] int64; slot of each sample in the epoch, the key of its random choices.
        epoch: 0-based; int, or 0-d int64 tensor on the device (a recorded step reads it there).
        drawn: tensors that `PretrainMethod.draw` made in the loader's threads, by name; with labels also `targets`
            [B, L] int64, ids of the characters from 0 and -1 behind the end, and `lengths` [B] int64, 0 where a
            sample has no label.
        step_index: [A * B] int64; `index` of all A micro-batches of this process in the step; None: this is the only
            one.
        progress: 0-d float32 on the device, share of the run that is done, in [0, 1); None: the run's beginning.
        images: [B, H, W, 3] uint8, before augmentation, for contact sheets; None in a recorded step.
    """

    views: dict[str, Tensor]
    index: Tensor
    epoch: int | Tensor
    drawn: dict[str, Tensor] = field(default_factory=dict)
    step_index: Tensor | None = None
    progress: Tensor | None = None
    images: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What differs from batch to batch and is on the device of training, by `views.NAME`, `drawn.NAME`, `index`."""
        views = {f"views.{name}": x for name, x in self.views.items()}
        return {**views, **{f"drawn.{name}": x for name, x in self.drawn.items()}, "index": self.index}


@dataclass
class StepOutput:
    """Result of a micro-batch.

    Attributes:
        loss: 0-d, with gradient. One backward serves all players of a method: what must not learn from a part of it
            sees that part detached.
        terms: every loss term by its name (`loss_...`), 0-d, detached.
        monitors: early warnings (accuracy, spread), 0-d; empty unless asked for.
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

    def gather_with_grad(self, tensor: Tensor) -> Tensor:
        """The same with gradient: each rank's part receives the sum of the gradients that all ranks have for it.

        With a loss that is the mean over a rank's own rows, the trainer's mean over ranks of the parameters'
        gradients is then the gradient of the mean over all rows.
        """
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

    def gather_with_grad(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor
