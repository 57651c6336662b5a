"""Masked image modelling: a branch of a method, or all of one (paper section III-C)."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast import models, ops
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.fields import number
from rcmstr_fast.methods.protocol import PICTURES, Batch, Collectives, Hidden, to_pixels
from rcmstr_fast.models.encoder import Encoder
from rcmstr_fast.ops.precision import full_precision


@dataclass
class MaskSettings:
    """Fields of a method that hides a part of the images and reconstructs it.

    Attributes:
        mask_ratio: hidden share of the mask units.
        num_blocks: hidden blocks of 16 pixels, full height.
        mask_unit: unit of the CNN's mask (the ViT masks its tokens).
        mask_rule: how the mask crosses the 25 -> 26 column pool.
        norm_pix: reconstruct pixels normalised a mask unit.
        pixel_loss: mse (Eq. 8) or l1 (as SimMIM), over the hidden pixels.
    """

    mask_ratio: float = number(0.7, low=0, high=1)
    num_blocks: int = number(1, low=0, high=64)
    mask_unit: Literal["lattice", "stage3", "column"] = "stage3"
    mask_rule: Literal["anchored", "any"] = "anchored"
    norm_pix: bool = False
    pixel_loss: Literal["mse", "l1"] = "mse"


def hidden(settings: MaskSettings) -> Hidden:
    """What a CNN leaves out of a pass that is masked so."""
    return Hidden(settings.mask_unit, settings.mask_ratio, settings.num_blocks, settings.mask_rule)


class MaskedImageModelling(nn.Module):
    """Masks a view, reconstructs its hidden pixels with the online encoder and a head of its own.

    Args:
        config: resolved configuration; its method has the fields of `MaskSettings`.
        encoder: the online encoder, to size the head; it is passed to `forward`, not kept.
    """

    def __init__(self, config: PretrainConfig, encoder: Encoder) -> None:
        super().__init__()
        self.config = config
        self.settings = cast(MaskSettings, config.method)
        self.head = models.build_mim_head(config.model, encoder)
        self.unit = encoder.mask_unit(self.settings.mask_unit)

    def masks(self, batch: Batch) -> ops.Masks:
        """Masks of a micro-batch, a function of (seed, epoch, index)."""
        return self._draw(batch.index, batch.epoch)

    def forward(
        self, encoder: Encoder, images: Tensor, batch: Batch, masks: ops.Masks, collectives: Collectives
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction loss.

        Args:
            encoder: the online encoder.
            images: [B, 3, H, W] normalised (rectified) query view.
            batch: the micro-batch that they come from.
            masks: what is hidden.
            collectives: the divisor 3N of Eq. 8 counts the hidden pixels of the step: of all processes and micro-batches.
        Returns:
            loss_mim 0-d, whose mean over processes and micro-batches is that of the step; prediction [B, 3, H, W];
            encoder features.
        """
        features, active = encoder.forward_masked(images, masks, self.settings.mask_rule)
        prediction = self.head(features, active)
        compare = ops.masked_mse if self.settings.pixel_loss == "mse" else masked_l1
        loss = compare(full_precision(prediction), self.target(images, masks), masks.pixels)
        hidden = average = masks.pixels.sum().to(loss.dtype)
        if batch.step_index is not None:
            whole = self._draw(batch.step_index, batch.epoch).pixels.sum().to(loss.dtype)
            average = whole * (len(batch.index) / len(batch.step_index))
        return loss * (hidden / collectives.mean(average).clamp(min=1)), prediction, features

    def _draw(self, index: Tensor, epoch: int | Tensor) -> ops.Masks:
        method = self.settings
        size = (self.config.model.height, self.config.model.image_width)
        return ops.draw_masks(
            index,
            seed=self.config.seed,
            epoch=epoch,
            size=size,
            unit=self.unit,
            mask_ratio=method.mask_ratio,
            num_blocks=method.num_blocks,
        )

    def target(self, images: Tensor, masks: ops.Masks) -> Tensor:
        """Pixels in [0, 1], or (norm_pix) normalised over each mask unit: [B, 3, H, W] float32 (float64 for float64 images)."""
        pixels = full_precision(images.detach()) * 0.5 + 0.5
        if not self.settings.norm_pix:
            return pixels
        unit = (pixels.shape[2] // masks.grid.shape[1], pixels.shape[3] // masks.grid.shape[2])
        mean = F.avg_pool2d(pixels, unit).mean(dim=1, keepdim=True)
        square = F.avg_pool2d(pixels**2, unit).mean(dim=1, keepdim=True)
        std = torch.sqrt((square - mean**2).clamp(min=0) + 1e-6)
        mean, std = (F.interpolate(x, scale_factor=unit) for x in (mean, std))
        return (pixels - mean) / std

    def pictures(self, images: Tensor, masks: ops.Masks, prediction: Tensor) -> dict[str, Tensor]:
        """Masked views and reconstructions (hidden pixels predicted, visible ones as they are); not of norm_pix."""
        pixels, hidden = to_pixels(images), masks.pixels[:PICTURES]
        sheet = {"masked": pixels.masked_fill(hidden, 0.5)}
        if not self.settings.norm_pix:
            guess = prediction[:PICTURES].detach().float().clamp(0, 1)
            sheet["reconstruction"] = guess.where(hidden, pixels)
        return sheet


def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference over the hidden pixels, 0-d; arguments as of `ops.masked_mse`."""
    hidden = mask.expand_as(prediction)
    difference = torch.where(hidden, (prediction - target).abs(), 0.0)
    return difference.sum() / (mask.sum() * prediction.shape[1]).clamp(min=1)
