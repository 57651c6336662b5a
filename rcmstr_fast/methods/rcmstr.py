"""RCMSTR: RCLSTR with masked image modelling through the same encoder (paper Eq. 9)."""

import torch
from torch import Tensor

from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.methods.contrastive import PICTURES, ContrastiveMethod, to_pixels
from rcmstr_fast.methods.masking import MaskedImageModelling
from rcmstr_fast.methods.step import Collectives, StepBatch


class RCMSTR(ContrastiveMethod):
    """loss = loss_mim + beta * loss_rcl.

    Decoupled (default): the masked view serves the reconstruction alone. Coupled: its features are the
    query too, and the plain forward of the query view is left out.
    """

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        self.mim = MaskedImageModelling(config, self.online.encoder)

    def _online_frames(
        self, images: Tensor, passes: int, batch: StepBatch, pictures: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        query = images[: len(batch.index)]
        masks = self.mim.masks(batch)
        loss, prediction, features = self.mim(self.online.encoder, query, batch, masks, self.collectives)
        if self.config.method.coupled:
            frames = [self.online.encoder.masked_frames(features)]
            if passes > 1:
                frames.append(self.online.encode(images[len(batch.index) :], passes - 1))
            projected = self.online.project(torch.cat(frames), passes)
        else:
            projected = self.online.frames(images, passes)
        return projected, loss, self._pictures(query, masks.pixels, prediction) if pictures else {}

    def _pictures(self, images: Tensor, hidden: Tensor, prediction: Tensor) -> dict[str, Tensor]:
        """Masked views and reconstructions (hidden pixels predicted, visible ones as they are)."""
        pixels, hidden = to_pixels(images[:PICTURES]), hidden[:PICTURES]
        sheet = {"masked": pixels.masked_fill(hidden, 0.5)}
        if not self.config.method.norm_pix:
            guess = prediction[:PICTURES].detach().float().clamp(0, 1)
            sheet["reconstruction"] = guess.where(hidden, pixels)
        return sheet
