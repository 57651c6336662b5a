"""Heads of masked image modelling: features of the masked pass to pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.models.transformer import PATCH, mlp


def unpatchify(values: Tensor, size: tuple[int, int], colours: int = 3) -> Tensor:
    """Patch values to images.

    Args:
        values: `[B, n, colours * ph * 4]`, the n patches of ph x 4 pixels row by row, each ordered colour, row, column.
        size: (H, W) of the images; ph follows from it and n.
        colours: channels of the images.
    Returns:
        `[B, colours, H, W]`.
    """
    height, width = size
    columns = width // PATCH
    rows = values.shape[1] // columns
    patches = values.unflatten(2, (colours, height // rows, PATCH)).unflatten(1, (rows, columns))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class TokenMIMHead(nn.Module):
    """The ViT's head: three linear layers on each token, as in DiG."""

    def __init__(self, in_channels: int, size: tuple[int, int], hidden: int = 192) -> None:
        """Make the head for images of `size` = (H, W)."""
        super().__init__()
        self.size = size
        self.layers = nn.Sequential(
            nn.Linear(in_channels, hidden, bias=False),
            nn.Linear(hidden, hidden, bias=False),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, 3 * PATCH * PATCH),
        )

    def forward(self, features: Tensor, active: Tensor | None = None) -> Tensor:
        """Tokens `[B, N, C]` to a prediction `[B, 3, H, W]` in pixel range (targets in [0, 1]); `active` is None."""
        return unpatchify(self.layers(features), self.size)


class ConvNeXtBlock(nn.Module):
    """Depthwise 1x7 convolution over frames, LayerNorm, 4x MLP with GELU, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = mlp(channels, 4 * channels)

    def forward(self, frames: Tensor) -> Tensor:
        """frames `[B, T, C]` to `[B, T, C]`."""
        mixed = self.depthwise(frames.transpose(1, 2)).transpose(1, 2)
        return frames + self.mlp(self.norm(mixed))


class FrameMIMHead(nn.Module):
    """The CNN's head: each frame predicts a column of H x 4 pixels after one ConvNeXt block."""

    def __init__(self, in_channels: int, size: tuple[int, int]) -> None:
        """Make the head for images of `size` = (H, W)."""
        super().__init__()
        self.size = size
        self.embed = nn.Linear(in_channels, in_channels)
        self.mask_token = nn.Parameter(torch.zeros(in_channels))
        self.block = ConvNeXtBlock(in_channels)
        self.pixels = nn.Linear(in_channels, 3 * size[0] * PATCH)

    def forward(self, features: Tensor, active: Tensor) -> Tensor:
        """Predict the image.

        Args:
            features: `[B, T, C]` of the masked pass.
            active: `[B, T]` bool; the others are replaced by the learned vector.
        Returns:
            `[B, 3, H, W]` in pixel range (targets in [0, 1]); T frames are averaged to W/4 columns.
        """
        x = self.embed(features)
        x = self.block(torch.where(active[:, :, None], x, self.mask_token.to(x.dtype)))
        # The linear layer commutes with averaging, so the fewer columns go through it.
        width = x.shape[1] - self.size[1] // PATCH + 1  # 2 (or 1): as adaptive pooling, but repeatable on a GPU
        columns = F.avg_pool1d(x.transpose(1, 2), width, 1).transpose(1, 2)
        return unpatchify(self.pixels(columns), self.size)
