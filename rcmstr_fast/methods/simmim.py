"""Masked image modelling alone: SimMIM (Xie et al., CVPR 2022) as RCMSTR compares itself with (Table I, Figures 7, 8)."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F

from rcmstr_fast.config import MethodConfig, PretrainConfig, is_vit, require
from rcmstr_fast.fields import number
from rcmstr_fast.methods.base import EncoderMethod
from rcmstr_fast.methods.parts.masking import MaskedImageModelling, MaskSettings, hidden
from rcmstr_fast.methods.parts.monitors import detail, spread
from rcmstr_fast.methods.protocol import Batch, Collectives, Pass, StepOutput, ViewSpec
from rcmstr_fast.methods.registry import register


@dataclass
class SimMIMConfig(MethodConfig, MaskSettings):
    """SimMIM: hide a part of the picture, predict its pixels.

    Attributes:
        name: simmim.
        num_blocks: hidden blocks of 16 pixels, full height; 0: the patch mask alone.
        augment: preset of the view: none (only resized) or pretrain.
        whole_pass: the CNN also sees the whole view, without gradient, so that its batch norms have running statistics
            for evaluation: those of a masked pass are not kept. The ViT needs none.
    """

    name: str = "simmim"
    num_blocks: int = number(0, low=0, high=64)
    augment: Literal["none", "pretrain"] = "none"
    whole_pass: bool = True

    def check(self, run: PretrainConfig) -> None:
        """The pixels are predicted from what comes before a sequence model, which would never learn."""
        require(run.model.sequence == "none", f"model.sequence must be none for method {self.name}", run.model.sequence)


@register(
    paper="SimMIM (Xie et al., CVPR 2022), Eq. 8 of RCMSTR",
    needs=("masks",),
    tiny={"bn_group_size": 2, "mask_ratio": 0.5},
)
class SimMIM(EncoderMethod):
    """loss = loss_mim. A ViT gets a mask token where it is hidden, a CNN works on the visible sites only."""

    Config = SimMIMConfig

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        self.mim = MaskedImageModelling(config, self.encoder)
        self.whole_pass = cast(SimMIMConfig, config.method).whole_pass and not is_vit(config.model)

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """One view."""
        return (ViewSpec("image", cast(SimMIMConfig, config.method).augment),)

    @classmethod
    def passes(cls, config: PretrainConfig) -> tuple[Pass, ...]:
        """The masked view; the CNN's whole view without gradient."""
        method = cast(SimMIMConfig, config.method)
        whole = (Pass(trained=False),) if method.whole_pass and not is_vit(config.model) else ()
        return (Pass(hidden=hidden(method)), *whole)

    def forward(self, batch: Batch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """See `PretrainMethod`."""
        images = self.rectifier(batch.views["image"])
        masks = self.mim.masks(batch)
        loss, prediction, tokens = self.mim(self.encoder, images, batch, masks, self.collectives)
        if self.whole_pass:
            with torch.no_grad():
                self.encoder(images)
        watched = {}
        if monitor:
            words = F.normalize(self.encoder.masked_frames(tokens.detach()).float().mean(1), dim=1)
            target = self.mim.target(images, masks)
            watched = {"spread": spread(words), "detail": detail(prediction.detach(), target, masks.pixels)}
        sheet = self.mim.pictures(images, masks, prediction) if pictures else {}
        return StepOutput(loss, {"loss_mim": loss.detach()}, watched, sheet)
