"""The networks of the baseline step in plain PyTorch: what a careful user would write without kernels of their own.

Parameter names are those of `rcmstr_fast.models`, so that one state dict loads into both. The masked pass of the
ResNet is dense convolution times mask with batch statistics over the active sites.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.config import ModelConfig
from rcmstr_fast.ops import reference

SIZES = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (512, 8)}
PATCH = 4


def masked_batch_norm(x: Tensor, active: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """Batch norm over the active sites: x `[B, C, h, w]`, zero where `active [B, 1, h, w]` (0 or 1) is 0."""
    wide, count = x.to(torch.promote_types(x.dtype, torch.float32)), active.sum()
    mean = wide.sum(dim=(0, 2, 3), keepdim=True) / count
    centred = (wide - mean) * active
    var = centred.square().sum(dim=(0, 2, 3), keepdim=True) / count
    y = centred * torch.rsqrt(var + bn.eps) * bn.weight[:, None, None] + bn.bias[:, None, None]
    return y.to(x.dtype)


class ConvBN(nn.Module):
    """Convolution, batch norm, optional residual, optional ReLU; with `active` at these sites only."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride=(1, 1), padding=(1, 1), relu=True) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, x: Tensor, active: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x `[B, C, h, w]`; active `[B, 1, h', w']` of the output."""
        x = self.conv(x)
        x = self.bn(x) if active is None else masked_batch_norm(x * active.to(x.dtype), active, self.bn)
        if residual is not None:
            x = x + residual
        if self.relu:
            x = F.relu(x)
        return x if active is None else x * active.to(x.dtype)


class Block(nn.Module):
    """Two 3x3 units around a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvBN(inputs, outputs), ConvBN(outputs, outputs)
        self.shortcut = None if inputs == outputs else ConvBN(inputs, outputs, 1, padding=(0, 0), relu=False)

    def forward(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        """x `[B, C, h, w]`."""
        residual = x if self.shortcut is None else self.shortcut(x, active)
        return self.conv2(self.conv1(x, active), active, residual)


class Stage(nn.Module):
    """An optional 2x2 max pool and the layers behind it."""

    def __init__(self, layers: list[nn.Module], pool: tuple | None = None) -> None:
        super().__init__()
        self.layers, self.pool = nn.ModuleList(layers), pool

    def forward(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        """x `[B, C, h, w]`; the maps are not negative, so that zeros at inactive sites never win a pool."""
        if self.pool is not None:
            x = F.max_pool2d(x, 2, *self.pool)
            x = x if active is None else x * active.to(x.dtype)
        for layer in self.layers:
            x = layer(x, active)
        return x


class ResNet29(nn.Module):
    """Images `[B, 3, 32, W]` to frames `[B, W/4 + 1, C]`."""

    def __init__(self, width: float) -> None:
        super().__init__()
        c32, c64, c128, c256, c512 = (round(c * width) for c in (32, 64, 128, 256, 512))
        self.out_channels = c512
        last = [Block(c256, c512), *(Block(c512, c512) for _ in range(4)), ConvBN(c512, c512)]
        self.stages = nn.ModuleList(
            [
                Stage([ConvBN(3, c32), ConvBN(c32, c64)]),
                Stage([Block(c64, c128), ConvBN(c128, c128)], ((2, 2), (0, 0))),
                Stage([Block(c128, c256), Block(c256, c256), ConvBN(c256, c256)], ((2, 2), (0, 0))),
                Stage([*last, *(Block(c512, c512) for _ in range(3))], ((2, 1), (0, 1))),
                Stage([ConvBN(c512, c512, 2, (2, 1), (0, 1))]),
                Stage([ConvBN(c512, c512, 2, (1, 1), (0, 0))]),
            ]
        )

    def forward(self, images: Tensor) -> Tensor:
        """The whole images."""
        x = images
        for stage in self.stages:
            x = stage(x)
        return x.squeeze(2).transpose(1, 2)

    def forward_masked(self, images: Tensor, masks: reference.Masks, rule: str) -> tuple[Tensor, Tensor]:
        """The visible sites only: features `[B, T, C]` and active frames `[B, T]`."""
        width = images.shape[3]
        sizes = [(32, width), (16, width // 2), (8, width // 4), (4, width // 4 + 1), (2, width // 4 + 2)]
        sites = reference.active_sites(masks.grid, [*sizes, (1, width // 4 + 1)], rule)
        x = images * ~masks.pixels
        for stage, at in zip(self.stages, sites, strict=True):
            x = stage(x, at.active.float())
        return x.squeeze(2).transpose(1, 2), sites[-1].active[:, 0, 0]


class TransformerBlock(nn.Module):
    """Pre-norm block: attention and MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, N, dim]`."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn["proj"](F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class VisionTransformer(nn.Module):
    """Images `[B, 3, H, W]` to frames `[B, W/4, dim]`."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        dim, heads = SIZES[model.encoder]
        self.out_channels, self.grid = dim, (model.height // PATCH, model.image_width // PATCH)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, PATCH, PATCH)})
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.register_buffer("pos_embed", torch.zeros(1, self.grid[0] * self.grid[1], dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads) for _ in range(model.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """The whole images."""
        return self._encode(self._tokens(images)).unflatten(1, self.grid).mean(1)

    def forward_masked(self, images: Tensor, masks: reference.Masks, rule: str) -> tuple[Tensor, None]:
        """Hidden tokens replaced by the learned vector: tokens `[B, N, dim]`."""
        tokens = self._tokens(images)
        return self._encode(torch.where(masks.grid.flatten(1)[:, :, None], self.mask_token.to(tokens), tokens)), None

    def _tokens(self, images: Tensor) -> Tensor:
        return self.patch_embed["proj"](images).flatten(2).transpose(1, 2)

    def _encode(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class LSTMLayer(nn.Module):
    """A bidirectional LSTM and a linear map."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, hidden)

    def forward(self, frames: Tensor) -> Tensor:
        """frames `[B, T, C]`."""
        self.rnn.flatten_parameters()
        wide = frames.to(torch.promote_types(frames.dtype, torch.float32))  # bfloat16 would leave cuDNN
        return self.linear(self.rnn(wide)[0])


class Rows(nn.Module):
    """The ViT's MLP over rows: three linear layers with batch norm, the last one without affine."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, outputs, bias=False),
            nn.BatchNorm1d(outputs, affine=False),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """rows `[B, .., C]`."""
        return self.layers(rows.flatten(0, -2)).view(*rows.shape[:-1], -1)


def unpatchify(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Patch values `[B, n, 3 * ph * 4]` to images `[B, 3, H, W]`."""
    columns = size[1] // PATCH
    rows = values.shape[1] // columns
    patches = values.unflatten(2, (3, size[0] // rows, PATCH)).unflatten(1, (rows, columns))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class ConvNeXtBlock(nn.Module):
    """Depthwise 1x7 convolution, LayerNorm, MLP, residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, C]`."""
        mixed = self.norm(self.depthwise(x.transpose(1, 2)).transpose(1, 2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](mixed)))


class FrameHead(nn.Module):
    """The CNN's reconstruction head."""

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.embed, self.mask_token = nn.Linear(dim, dim), nn.Parameter(torch.zeros(dim))
        self.block, self.pixels = ConvNeXtBlock(dim), nn.Linear(dim, 3 * size[0] * PATCH)

    def forward(self, features: Tensor, active: Tensor) -> Tensor:
        """features `[B, T, C]`, active `[B, T]` to pixels `[B, 3, H, W]`."""
        x = self.embed(features)
        x = self.block(torch.where(active[:, :, None], x, self.mask_token.to(x.dtype)))
        columns = F.adaptive_avg_pool1d(x.transpose(1, 2), self.size[1] // PATCH).transpose(1, 2)
        return unpatchify(self.pixels(columns), self.size)


class TokenHead(nn.Module):
    """The ViT's reconstruction head."""

    def __init__(self, dim: int, size: tuple[int, int], hidden: int = 192) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden, bias=False),
            nn.Linear(hidden, hidden, bias=False),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, 3 * PATCH * PATCH),
        )

    def forward(self, features: Tensor, active: None = None) -> Tensor:
        """tokens `[B, N, C]` to pixels `[B, 3, H, W]`."""
        return unpatchify(self.layers(features), self.size)
