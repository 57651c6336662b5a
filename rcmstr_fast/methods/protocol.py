"""What a pretraining method is: the protocol between the trainer and one file of this package."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rcmstr_fast.config import MethodConfig, PretrainConfig
from rcmstr_fast.methods.step import Batch, Collectives, StepOutput
from rcmstr_fast.models.batch_norm import batch_norm_state, norms_of

#: Images of a column of the contact sheet.
PICTURES = 8


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
