"""The masked-image-modelling branch of RCMSTR (paper section III-C, SPEC section 6)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast import models, ops
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.methods.step import Collectives, StepBatch, full_precision


class MaskedImageModelling(nn.Module):
    """Masks the query view, reconstructs its hidden pixels with the online encoder and a head of its own.

    Args:
        config: resolved configuration.
        encoder: the online encoder, to size the head; it is passed to `forward`, not kept.
    """

    def __init__(self, config: PretrainConfig, encoder: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.head = models.build_mim_head(config.model, encoder)
        self.unit = encoder.mask_unit(config.method)

    def masks(self, batch: StepBatch) -> ops.Masks:
        """Masks of a micro-batch, a function of (seed, epoch, index)."""
        return self._draw(batch.index, batch.epoch)

    def forward(
        self, encoder: nn.Module, images: Tensor, batch: StepBatch, masks: ops.Masks, collectives: Collectives
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
        features, active = encoder.forward_masked(images, masks, self.config.method.mask_rule)
        prediction = self.head(features, active)
        loss = ops.masked_mse(full_precision(prediction), self.target(images, masks), masks.pixels)
        hidden = average = masks.pixels.sum().to(loss.dtype)
        if batch.step_index is not None:
            whole = self._draw(batch.step_index, batch.epoch).pixels.sum().to(loss.dtype)
            average = whole * (len(batch.index) / len(batch.step_index))
        return loss * (hidden / collectives.mean(average).clamp(min=1)), prediction, features

    def _draw(self, index: Tensor, epoch: int | Tensor) -> ops.Masks:
        method = self.config.method
        size = (self.config.model.height, self.config.model.image_width)
        return ops.draw_masks(
            index, seed=self.config.seed, epoch=epoch, size=size,
            unit=self.unit, mask_ratio=method.mask_ratio, num_blocks=method.num_blocks,
        )  # fmt: skip

    def target(self, images: Tensor, masks: ops.Masks) -> Tensor:
        """Pixels in [0, 1], or (norm_pix) normalised over each mask unit: [B, 3, H, W] float32 (float64 for float64 images)."""
        pixels = full_precision(images.detach()) * 0.5 + 0.5
        if not self.config.method.norm_pix:
            return pixels
        unit = (pixels.shape[2] // masks.grid.shape[1], pixels.shape[3] // masks.grid.shape[2])
        mean = F.avg_pool2d(pixels, unit).mean(dim=1, keepdim=True)
        square = F.avg_pool2d(pixels**2, unit).mean(dim=1, keepdim=True)
        std = torch.sqrt((square - mean**2).clamp(min=0) + 1e-6)
        mean, std = (F.interpolate(x, scale_factor=unit) for x in (mean, std))
        return (pixels - mean) / std
