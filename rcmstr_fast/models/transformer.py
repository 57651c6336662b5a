"""The parts of a vision transformer on 4x4 patches; parameter names as in timm."""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Pixels of a side of a patch.
PATCH = 4


def sinusoids(length: int, dim: int, device: torch.device | None = None) -> Tensor:
    """Fixed 1-D positions `[length, dim]` float32: sin in even columns, cos in odd ones, periods 2 pi to 2e4 pi."""
    rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64, device=device) * (-math.log(10000.0) / dim))
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :dim].float()


class PatchEmbed(nn.Module):
    """Each 4x4 patch to one token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        """images `[B, 3, H, W]` to tokens `[B, H/4 * W/4, dim]`, row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, N, dim]` to `[B, N, dim]`."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def mlp(dim: int, hidden: int) -> nn.Sequential:
    """Two linear layers around a GELU, `[.., dim]` to `[.., dim]`."""
    return nn.Sequential(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp(dim, 4 * dim)

    def forward(self, x: Tensor, paths: Tensor | None = None) -> Tensor:
        """x `[B, N, dim]` to `[B, N, dim]`; paths `[B, 2]`, factors of attention and MLP (stochastic depth)."""
        attended = self.attn(self.norm1(x))
        x = x + (attended if paths is None else attended * paths[:, 0, None, None].to(attended.dtype))
        mixed = self.mlp(self.norm2(x))
        return x + (mixed if paths is None else mixed * paths[:, 1, None, None].to(mixed.dtype))
