"""TextRotNet: tell by which quarter turn a word was rotated (Gidaris et al., ICLR 2018; Baek et al., CVPR 2021)."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.config import MethodConfig, PretrainConfig, Training
from rcmstr_fast.methods.base import EncoderMethod
from rcmstr_fast.methods.parts.monitors import entropy, spread
from rcmstr_fast.methods.protocol import Batch, Collectives, Pass, StepOutput, ViewSpec, to_pixels
from rcmstr_fast.methods.registry import register
from rcmstr_fast.ops.precision import full_precision

TURNS = 4


@dataclass
class RotNetConfig(MethodConfig):
    """TextRotNet: four copies of each word, turned by quarters; the network names the turn.

    Attributes:
        name: rotnet.
        augment: preset of the view that is turned.
    """

    cnn = Training(
        batch=128,
        epochs=5,
        optimizer="sgd",
        lr=0.1,
        lr_batch=0,
        weight_decay=5e-4,
        schedule="step",
        warmup_steps=0,
        clip=5.0,
    )
    vit = Training(batch=1024, epochs=10, weight_decay=0.1, min_lr=1e-5, clip=5.0)
    name: str = "rotnet"
    augment: Literal["none", "light", "pretrain"] = "none"


@register(
    paper="RotNet (Gidaris et al., ICLR 2018), for words as in Baek et al. (CVPR 2021)", tiny={"bn_group_size": 2}
)
class RotNet(EncoderMethod):
    """Cross entropy over the four turns, from the mean of the frames."""

    Config = RotNetConfig

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        self.classifier = nn.Linear(self.encoder.out_channels, TURNS)

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """One view; `forward` turns it."""
        return (ViewSpec("image", cast(RotNetConfig, config.method).augment),)

    @classmethod
    def passes(cls, config: PretrainConfig) -> tuple[Pass, ...]:
        """Every turn of the view."""
        return (Pass(),) * TURNS

    def forward(self, batch: Batch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """See `PretrainMethod`."""
        copies = turned(batch.views["image"])
        words = self.encoder(self.rectifier(copies.flatten(0, 1))).mean(1)
        logits = full_precision(self.classifier(words))
        turns = torch.arange(TURNS, device=logits.device).repeat(len(copies))
        loss = F.cross_entropy(logits, turns)
        watched = {}
        if monitor:
            scores = logits.detach()
            watched = {
                "spread": spread(F.normalize(full_precision(words.detach()), dim=1)),
                "accuracy": (scores.argmax(1) == turns).float().mean(),
                "entropy": entropy(scores.softmax(1)),
            }
        sheet = {f"{90 * i} degrees": to_pixels(copies[:, i]) for i in range(TURNS)} if pictures else {}
        return StepOutput(loss, {"loss_rotation": loss.detach()}, watched, sheet)


def turned(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] turned anticlockwise by 0, 90, 180 and 270 degrees, each resized to H x W: [B, 4, 3, H, W].

    The copies of an image stand together, so that groups of batch norm do not depend on the size of the batch.
    """
    size = images.shape[2:]
    copies = [images]
    for quarters in range(1, TURNS):
        copy = torch.rot90(images, quarters, (2, 3))
        if copy.shape[2:] != size:  # a narrower picture is made from a wider one: filtered before it is sampled
            copy = F.interpolate(full_precision(copy), size, mode="bilinear", antialias=True, align_corners=False)
            copy = copy.to(images.dtype)
        copies.append(copy)
    return torch.stack(copies, dim=1)
