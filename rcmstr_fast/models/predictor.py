"""Predictors: pooled rows of one level to the space of the queue."""

from torch import Tensor, nn


class LinearPredictor(nn.Module):
    """One linear layer (the CNN's predictor; the ViT takes `projector.MLPHead`).

    Attributes:
        out_dim: channels of the output (D).
    """

    def __init__(self, in_channels: int, out_dim: int) -> None:
        super().__init__()
        self.out_dim = out_dim
        self.linear = nn.Linear(in_channels, out_dim)

    def forward(self, rows: Tensor) -> Tensor:
        """rows `[B, .., P]` to `[B, .., D]`, not normalised."""
        return self.linear(rows)
