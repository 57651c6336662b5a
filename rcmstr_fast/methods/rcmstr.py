"""RCMSTR: RCLSTR with masked image modelling through the same encoder (paper Eq. 9)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from rcmstr_fast.config import LEVELS, PretrainConfig, require
from rcmstr_fast.fields import number
from rcmstr_fast.methods.contrastive import ContrastiveMethod
from rcmstr_fast.methods.levels import RelationalSettings
from rcmstr_fast.methods.parts.masking import MaskedImageModelling, MaskSettings, hidden
from rcmstr_fast.methods.protocol import Batch, Collectives, Pass, ViewSpec
from rcmstr_fast.methods.registry import register


@dataclass
class RCMSTRConfig(RelationalSettings, MaskSettings):
    """RCMSTR: RCLSTR and masked image modelling.

    Attributes:
        name: rcmstr.
        beta: weight of loss_rcl beside loss_mim.
        coupled: the masked view is also the query (the paper's ablation; decoupled by default).
        mim_view: the view that is masked: the query view, or a third one of its own (the paper speaks of both).
    """

    own: ClassVar[dict[str, Any]] = {"levels": list(LEVELS), "permute": True, "inter": "both"}
    name: str = "rcmstr"
    beta: float = number(0.1, low=0)
    coupled: bool = False
    mim_view: Literal["query", "own"] = "query"

    def check(self, run: PretrainConfig) -> None:
        """A coupled view is the query view."""
        super().check(run)
        expected = "method.mim_view must be query where method.coupled=true"
        require(not self.coupled or self.mim_view == "query", expected, self.mim_view)


@register(
    paper="Relational Contrastive Learning and Masked Image Modeling for STR (Lin et al.)",
    needs=("momentum", "queue", "masks"),
    tiny={"queue_size": 64, "bn_group_size": 2, "bn_shuffle": False},
)
class RCMSTR(ContrastiveMethod):
    """loss = loss_mim + beta * loss_rcl.

    Decoupled (default): the masked view serves the reconstruction alone. Coupled: its features are the
    query too, and the plain forward of the query view is left out.
    """

    Config = RCMSTRConfig

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        self.beta = self.settings.beta
        self.mim = MaskedImageModelling(config, self.online.encoder)

    @property
    def settings(self) -> RCMSTRConfig:
        """The method's own configuration."""
        return cast(RCMSTRConfig, self.config.method)

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """With mim_view=own a third view, which is only masked."""
        wanted = super().views(config)
        return (*wanted, ViewSpec("mim")) if cast(RCMSTRConfig, config.method).mim_view == "own" else wanted

    @classmethod
    def passes(cls, config: PretrainConfig) -> tuple[Pass, ...]:
        """As of the contrastive methods, with the masked view, which is the query where the two are coupled."""
        method = cast(RCMSTRConfig, config.method)
        plain = super().passes(config)
        return (Pass(hidden=hidden(method)), *plain[int(method.coupled) :])

    def _online_frames(
        self, images: Tensor, passes: int, batch: Batch, pictures: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        masked = images[: len(batch.index)]
        if self.settings.mim_view == "own":
            masked = self.online.rectify(batch.views["mim"])
        masks = self.mim.masks(batch)
        loss, prediction, features = self.mim(self.online.encoder, masked, batch, masks, self.collectives)
        if self.settings.coupled:
            frames = [self.online.encoder.masked_frames(features)]
            if passes > 1:
                frames.append(self.online.encode(images[len(batch.index) :], passes - 1))
            projected = self.online.project(torch.cat(frames), passes)
        else:
            projected = self.online.frames(images, passes)
        return projected, loss, self.mim.pictures(masked, masks, prediction) if pictures else {}
