"""Encoder and segmentation head as one network."""

from typing import Any

import torch
from torch import Tensor, nn

from rcmstr_fast.config import ModelConfig, is_vit
from rcmstr_fast.evaluation.over_encoder import OverEncoder, Precision
from rcmstr_fast.models.segmentation import SegmentationHead
from rcmstr_fast.ops.precision import full_precision

#: Above this value of the head a pixel is text; the targets are 0 and 1.
THRESHOLD = 0.5


class Segmenter(OverEncoder):
    """Images to masks of text.

    There is no rectifier in it, which would move the pixels away from their places in the picture.

    Attributes, beside those of `OverEncoder`:
        head: a `SegmentationHead`.
        shape: its blocks, heads and dim.
    """

    kind = "segmentation network"
    format = "rcmstr_fast segmenter 1"

    def __init__(
        self,
        model: ModelConfig,
        encoder: nn.Module,
        *,
        blocks: int = 3,
        heads: int = 2,
        dim: int = 384,
        frozen: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        """Put a freshly initialised head on an encoder."""
        super().__init__(model, nn.Identity(), encoder, frozen=frozen, precision=precision)
        self.shape: dict[str, Any] = {"blocks": blocks, "heads": heads, "dim": dim}
        self.head = SegmentationHead(
            self.encoder.token_channels, self.size, frames=not is_vit(self.model), **self.shape
        )

    def frames(self, views: Tensor) -> Tensor:
        """Normalised images `[B, 3, H, W]` to tokens `[B, N, C]`, without gradient where the encoder is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen), self.autocast():
            return self.encoder.tokens(views)

    def forward(self, frames: Tensor) -> Tensor:
        """What `frames` gave to `[B, H, W]` float32, near 1 where there is text."""
        with self.autocast():
            return full_precision(self.head(frames))

    def loss(self, frames: Tensor, targets: Tensor) -> Tensor:
        """L1 between prediction and masks (paper section IV-D).

        Args:
            frames: `[B, N, C]`.
            targets: `[B, H, W]` float32, 1 where there is text and 0 elsewhere.
        Returns:
            0-d float32.
        """
        return (self(frames) - targets).abs().mean()

    def loss_terms(self, targets: Tensor) -> int:
        """The pictures; all have as many pixels."""
        return len(targets)

    @torch.no_grad()
    def masks(self, frames: Tensor) -> Tensor:
        """What `frames` gave to `[B, H, W]` bool: text."""
        return self(frames) > THRESHOLD

    def described(self) -> dict[str, Any]:
        """The head, as the file's header has it."""
        return self.shape
