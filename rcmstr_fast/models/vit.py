"""Vision transformer on 4x4 patches; parameter names as in timm."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast import random
from rcmstr_fast.models.encoder import Encoder, Features, check_images
from rcmstr_fast.models.transformer import PATCH, Block, PatchEmbed, sinusoids
from rcmstr_fast.ops.draw_masks import Masks
from rcmstr_fast.ops.replace_tokens import replace_tokens

#: encoder name -> (dim, heads)
SIZES = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (512, 8)}


class VisionTransformer(Encoder):
    """Images `[B, 3, H, W]` to tokens `[B, H/4 * W/4, dim]`, and to frames `[B, W/4, dim]`: the mean of each column.

    `pos_embed` `[1, N, dim]` is fixed (a buffer) and counts the patches alone; a class token, `cls_token`
    `[1, 1, dim]`, stands before them without a position, which its learned vector can hold itself.
    """

    pos_embed: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        depth: int = 12,
        height: int = 32,
        width: int = 128,
        class_token: bool = False,
        final_norm: bool = True,
        sequence_units: int = 0,
    ) -> None:
        """Make an encoder of `depth` blocks for images of height x width pixels, multiples of 4."""
        super().__init__(dim, sequence_units)
        if height % PATCH or width % PATCH:
            raise ValueError(f"VisionTransformer: height and width must be multiples of {PATCH}, got {height}x{width}")
        self.size = height, width
        self.grid = height // PATCH, width // PATCH
        self.patch_embed = PatchEmbed(dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.register_buffer("pos_embed", sinusoids(self.grid[0] * self.grid[1], dim)[None])
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6) if final_norm else nn.Identity()
        self.blocks.apply(_init)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(dim, -1))
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def mask_unit(self, wanted: str) -> str:
        """A ViT masks its tokens, whatever the configuration says of the CNN."""
        return "token"

    def features(
        self, images: Tensor, masks: Masks | None = None, rule: str = "anchored", *, paths: Tensor | None = None
    ) -> Features:
        """See `Encoder`; hidden tokens are replaced by `mask_token`, and `rule` has no use here.

        `paths` `[B, depth, 2]`, of `drop_paths`, are the factors of each block's two branches.
        """
        check_images(images, *self.size)
        if masks is None:
            tokens = self.patch_embed(images) + self.pos_embed
        else:
            if tuple(masks.grid.shape[1:]) != self.grid:
                raise ValueError(
                    f"masks.grid must be [B, {self.grid[0]}, {self.grid[1]}], got {list(masks.grid.shape)}"
                )
            # Cleared pixels keep NaN out of the weight gradient, where a replaced token would still let 0 * NaN in.
            tokens = self.patch_embed(torch.where(masks.pixels, 0.0, images))
            tokens = replace_tokens(tokens, self.mask_token, self.pos_embed[0], masks.grid.flatten(1))
        return self._features(tokens, paths)

    def crop_features(self, images: Tensor, paths: Tensor | None = None) -> Features:
        """Features of pictures smaller than the encoder's own, as multi-crop training has them.

        Args:
            images: `[B, 3, h, w]`, normalised; h and w are multiples of 4, at most the encoder's own. Each token takes
                the position of the token of a whole picture that is at its place there.
            paths: as of `features`.
        """
        check_images(images, *images.shape[2:])
        grid = images.shape[2] // PATCH, images.shape[3] // PATCH
        positions = self.pos_embed.unflatten(1, self.grid).permute(0, 3, 1, 2)
        positions = F.interpolate(positions, grid, mode="nearest").flatten(2).transpose(1, 2)
        return self._features(self.patch_embed(images) + positions, paths)

    def levels(self, images: Tensor, early: int, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Encoder`; hidden tokens are replaced by `mask_token`."""
        check_images(images, *self.size)
        x = self.patch_embed(images)
        x = x + self.pos_embed if hidden is None else replace_tokens(x, self.mask_token, self.pos_embed[0], hidden)
        x = lower = self._entered(x)
        for behind, block in enumerate(self.blocks, 1):
            x = self.run_part(block, x)
            lower = x if behind == early else lower
        first = 0 if self.cls_token is None else 1
        return lower[:, first:].transpose(1, 2).unflatten(2, self.grid), self.norm(x)[:, first:]

    def part(self, images: Tensor, places: Tensor) -> Tensor:
        """Some tokens, encoded as if there were no others.

        Args:
            images: `[B, 3, H, W]`, normalised; pixels of the other tokens may hold anything.
            places: `[B, n]` int64 of the tokens, row by row.
        Returns:
            `[B, n, C]` in the order of `places`.
        """
        check_images(images, *self.size)
        at = places[..., None].expand(-1, -1, self.token_channels)
        patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        patches = patches.gather(1, places[..., None].expand(-1, -1, patches.shape[2]))
        project = self.patch_embed.proj
        tokens = F.linear(patches, project.weight.flatten(1), project.bias)
        tokens = self._entered(tokens + self.pos_embed.expand(len(images), -1, -1).gather(1, at))
        return self._encode(tokens)[:, tokens.shape[1] - places.shape[1] :]

    def _features(self, tokens: Tensor, paths: Tensor | None = None) -> Features:
        tokens = self._encode(self._entered(tokens), paths)
        return Features(tokens) if self.cls_token is None else Features(tokens[:, 1:], tokens[:, 0])

    def _entered(self, tokens: Tensor) -> Tensor:
        """The tokens behind the class token, if there is one."""
        if self.cls_token is None:
            return tokens
        return torch.cat([self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)

    def columns(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to the mean of each column, `[B, W/4, C]`."""
        return tokens.unflatten(1, self.grid).mean(1)

    def _encode(self, x: Tensor, paths: Tensor | None = None) -> Tensor:
        of_blocks = [()] * len(self.blocks) if paths is None else [(found,) for found in paths.unbind(1)]
        for block, found in zip(self.blocks, of_blocks, strict=True):
            x = self.run_part(block, x, *found)
        return self.norm(x)


def drop_paths(index: Tensor, *, seed: int, epoch: int, views: int, depth: int, rate: float) -> Tensor:
    """Which branches of a ViT's blocks are left out (stochastic depth; Huang et al., ECCV 2016).

    A branch of block i is left out with the chance rate * i / (depth - 1), for each image and view on its own; the
    others grow by the inverse of the chance to stay, so that their mean is that of the whole network.

    Args:
        index: `[B]` int64 slots.
        seed: of the run.
        epoch: 0-based.
        views: passes an image.
        depth: blocks.
        rate: the chance in the last block, below 1.
    Returns:
        `[B, views, depth, 2]` float32 factors of attention and MLP, 0 where left out.
    """
    drawn = random.uniform(random.words(index, views * depth * 2, seed=seed, stream=random.PATHS, epoch=epoch))
    chance = torch.linspace(0, rate, depth)[:, None]
    return (drawn.view(len(index), views, depth, 2) >= chance) / (1 - chance)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
