"""Text segmentation: an encoder's tokens to one number a pixel."""

import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.models.mim_head import unpatchify
from rcmstr_fast.models.transformer import PATCH, Block


class SegmentationHead(nn.Module):
    """Attention blocks over all tokens, then a linear layer to the pixels of each.

    A ViT's token becomes its 4x4 pixels; a CNN's frame the 4 columns of pixels below it, which are H/4 such patches.
    """

    def __init__(
        self,
        in_channels: int,
        size: tuple[int, int],
        *,
        frames: bool,
        dim: int = 384,
        blocks: int = 3,
        heads: int = 2,
    ) -> None:
        """Make a head.

        Args:
            in_channels: C of the tokens.
            size: (H, W) of the images, multiples of 4.
            frames: the tokens are a CNN's frames, not patches.
            dim: channels of the blocks; tokens of another number go through a linear layer first.
            blocks: attention blocks.
            heads: attention heads of each block.
        """
        super().__init__()
        self.size, self.of_frames = size, frames
        self.embed = nn.Identity() if in_channels == dim else nn.Linear(in_channels, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pixels = nn.Linear(dim, PATCH * (size[0] if frames else PATCH))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to `[B, H, W]`, near 1 where there is text and near 0 elsewhere.

        T frames of a CNN are averaged to W/4 columns.
        """
        x = self.norm(self.blocks(self.embed(tokens)))
        if self.of_frames:  # the linear layer commutes with averaging, so the fewer columns go through it
            x = F.avg_pool1d(x.transpose(1, 2), x.shape[1] - self.size[1] // PATCH + 1, 1).transpose(1, 2)
        return unpatchify(self.pixels(x), self.size, 1)[:, 0]
