"""What a pretraining method is: the protocol between the trainer and one file of this package."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from rcmstr_fast.config import MethodConfig, PretrainConfig
from rcmstr_fast.models.batch_norm import batch_norm_state, norms_of

#: Images of a column of the contact sheet.
PICTURES = 8


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


@dataclass(frozen=True)
class ViewSpec:
    """A view that a method wants of every image.

    Attributes:
        name: key in `Batch.views`.
        preset: name of an augmentation preset of `ops.augment_views`, or a preset itself.
        size: (height, width) that the augmented image is resized to; None: as it is.
        permuted_of: name of another view of which this one is a copy with its strips in the order `drawn["order"]`
            ([B, N] int64, as of `ops.draw_order`); it has no augmentation of its own.
    """

    name: str
    preset: Any = "pretrain"
    size: tuple[int, int] | None = None
    permuted_of: str | None = None


@dataclass(frozen=True)
class Hidden:
    """What a CNN's masked pass leaves out: arguments of `ops.draw_masks` and `ops.active_sites`."""

    unit: str
    ratio: float
    blocks: int
    rule: str


@dataclass(frozen=True)
class Pass:
    """One way of an image through the encoder in a step, as far as its cost is concerned.

    Attributes:
        trained: with a backward pass.
        share: of the picture that is encoded.
        hidden: what a CNN does not compute; None: nothing is hidden.
    """

    trained: bool = True
    share: float = 1.0
    hidden: Hidden | None = None


@dataclass(frozen=True)
class MethodSpec:
    """What is known of a method without making it; see `register`.

    Attributes:
        name: `method.name`.
        method: the class.
        config: its configuration class.
        paper: where it is from.
        encoders: values of `model.encoder` that it serves.
        needs: what it keeps or asks for beside an encoder (queue, momentum network, labels, ..), in words.
        labels: batches hold the labels; the configuration then has `charset` and `max_length`.
        accumulates: a step in several micro-batches is the step in one (not so where the other images of a forward
            pass are the negatives). In several processes it always is: see `Collectives.gather_with_grad`.
        tiny: fields of `method` of the smallest configuration, for tests; other parts by dotted name
            (`model.image_width`).
    """

    name: str
    method: "type[PretrainMethod]"
    config: type[MethodConfig]
    paper: str
    encoders: tuple[str, ...]
    needs: tuple[str, ...] = ()
    labels: bool = False
    accumulates: bool = True
    tiny: dict[str, Any] | None = None


class PretrainMethod(nn.Module):
    """A pretraining method. A step is `begin_step`, one `forward` a micro-batch with its backward, `end_step`.

    All of a step may be recorded as a CUDA graph: it must be a function of tensors on the device, decide nothing by
    their values on the host, and change what it keeps (buffers) in place. What is random is a function of
    (seed, epoch, index): `rcmstr_fast.random`.

    Args:
        config: resolved.
        collectives: exchange with the other processes.
    """

    Config: ClassVar[type[MethodConfig]]
    spec: ClassVar[MethodSpec]

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__()
        self.config, self.collectives = config, collectives

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """The views of a run; two with the preset `pretrain` unless overridden."""
        return ViewSpec("query"), ViewSpec("key")

    @classmethod
    def draw(cls, config: PretrainConfig, index: Tensor, epoch: int) -> dict[str, Tensor]:
        """Random choices that the loader's threads make ahead, on the CPU: `Batch.drawn`.

        Args:
            config: resolved.
            index: [B] int64 slots.
            epoch: 0-based.
        Returns:
            name -> [B, ..].
        """
        return {}

    @classmethod
    def passes(cls, config: PretrainConfig) -> tuple[Pass, ...]:
        """The encoder's passes of an image in a step, from which costs follow; two trained ones unless overridden."""
        return Pass(), Pass()

    def begin_step(self, progress: Tensor | None = None) -> None:
        """Once a step, before the first micro-batch: momentum networks move here.

        Args:
            progress: as of `Batch`.
        """

    def forward(self, batch: Batch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """Loss of a micro-batch, a mean over its images.

        Args:
            batch: views and what was drawn.
            monitor: also compute monitors.
            pictures: also return images for the contact sheet.
        """
        raise NotImplementedError

    def end_step(self, finite: Tensor | None = None) -> None:
        """Once a step, after the update: queues take keys, centres move.

        Args:
            finite: 0-d bool on the device; where it is False the step must leave nothing behind. None: it was finite.
        """

    def exported(self) -> dict[str, nn.Module]:
        """The parts that are kept: `encoder` and `rectifier` (`nn.Identity` for none), both submodules."""
        raise NotImplementedError

    def remarks(self) -> list[str]:
        """What a reader of the log should know before its first line; a sentence each."""
        return []

    def rates(self) -> dict[str, float]:
        """Factors of the learning rate by the beginning of parameter names: {"discriminator.": 4.0}."""
        return {}

    def compile_networks(self) -> None:
        """Let torch.compile have the dense passes of the networks, where the method knows them."""


def in_passes(part: Any, norms: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
    """`part` of several equal inputs as one batch, while batch norm works as if each were passed on its own.

    Args:
        part: a module or function of [n B, ..].
        norms: the module whose batch-norm layers it uses.
        inputs: n tensors [B, ..].
    Returns:
        n tensors.
    """
    with batch_norm_state(norms_of(norms), passes=len(inputs)):
        return tuple(part(torch.cat(inputs) if len(inputs) > 1 else inputs[0]).chunk(len(inputs)))


def to_pixels(images: Tensor, count: int = PICTURES) -> Tensor:
    """The first `count` normalised images as float32 pixels in [0, 1]."""
    return (images[:count].detach().float() * 0.5 + 0.5).clamp(0, 1)
