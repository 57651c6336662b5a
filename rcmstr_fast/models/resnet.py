"""ResNet-29, the 29-layer residual network of the TRBA recogniser, dense and sparse with one set of weights."""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.models.conv_norm import ConvBN, Pair, WorkingConv2d, output_size
from rcmstr_fast.models.encoder import Encoder, Features, check_images
from rcmstr_fast.ops.draw_masks import Masks
from rcmstr_fast.ops.masked import Sites, active_sites, masked_max_pool2d, masked_storage, unpack_sites

HEIGHT = 32


class BasicBlock(nn.Module):
    """Two 3x3 units around a shortcut, which is a 1x1 unit where the channels change."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(in_channels, out_channels)
        self.conv2 = ConvBN(out_channels, out_channels)
        same = in_channels == out_channels
        self.shortcut = None if same else ConvBN(in_channels, out_channels, 1, padding=(0, 0), relu=False)

    def forward(self, x: Tensor, sites: Sites | None = None) -> Tensor:
        """x `[B, C, h, w]` to `[B, C', h, w]`."""
        residual = x if self.shortcut is None else self.shortcut(x, sites)
        return self.conv2(self.conv1(x, sites), sites, residual)

    def output_size(self, height: int, width: int) -> Pair:
        """The block keeps the size."""
        return height, width


class Stage(nn.Module):
    """An optional max pool and the layers that follow it; all its outputs have one size, so one set of sites."""

    def __init__(self, layers: Sequence[nn.Module], pool: tuple[Pair, Pair] | None = None) -> None:
        """Make a stage; `pool` is the stride and the padding of a 2x2 max pool in front of the layers."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.pool = pool

    def forward(self, x: Tensor, sites: Sites | None = None) -> Tensor:
        """x `[B, C, h, w]` to `[B, C', h', w']`."""
        if self.pool is not None:
            stride, padding = self.pool
            if sites is None:
                x = F.max_pool2d(x, 2, stride, padding)
            else:
                x = masked_max_pool2d(x, sites, kernel_size=2, stride=stride, padding=padding)
        for layer in self.layers:
            x = layer(x, sites)
        return x

    def windows(self) -> list[tuple[Pair, Pair, Pair]]:
        """Kernel, stride and padding of its convolutions."""
        found = [layer for layer in self.modules() if isinstance(layer, WorkingConv2d)]
        return [(c.kernel_size, c.stride, c.padding) for c in found]

    def output_size(self, height: int, width: int) -> Pair:
        """Size of the stage's maps for an input map of height x width."""
        size = height, width
        if self.pool is not None:
            size = output_size(size, (2, 2), *self.pool)
        for layer in cast(Iterable[ConvBN | BasicBlock], self.layers):
            size = layer.output_size(*size)
        return size


class ResNet29(Encoder):
    """ResNet-29 (blocks 1, 2, 5, 3): images `[B, 3, 32, W]` to tokens and frames `[B, W/4 + 1, 512 * width]`."""

    def __init__(self, width: float = 1.0, *, sequence_units: int = 0) -> None:
        """Make the network; `width` multiplies every channel count (44,264,480 parameters at 1)."""
        c32, c64, c128, c256, c512 = (round(c * width) for c in (32, 64, 128, 256, 512))
        super().__init__(c512, sequence_units)
        self.stages = nn.ModuleList(
            [
                Stage([ConvBN(3, c32), ConvBN(c32, c64)]),
                Stage([*_blocks(c64, c128, 1), ConvBN(c128, c128)], pool=((2, 2), (0, 0))),
                Stage([*_blocks(c128, c256, 2), ConvBN(c256, c256)], pool=((2, 2), (0, 0))),
                Stage([*_blocks(c256, c512, 5), ConvBN(c512, c512), *_blocks(c512, c512, 3)], pool=((2, 1), (0, 1))),
                Stage([ConvBN(c512, c512, 2, stride=(2, 1), padding=(0, 1))]),
                Stage([ConvBN(c512, c512, 2, padding=(0, 0))]),
            ]
        )

    def mask_unit(self, wanted: str) -> str:
        """The unit that the configuration names."""
        return wanted

    def stage_sizes(self, height: int, width: int) -> list[Pair]:
        """(height, width) of each stage's maps for an input of height x width, fine to coarse."""
        sizes = []
        for stage in cast(Iterable[Stage], self.stages):
            height, width = stage.output_size(height, width)
            sizes.append((height, width))
        return sizes

    def features(self, images: Tensor, masks: Masks | None = None, rule: str = "anchored") -> Features:
        """See `Encoder`; the tokens are the visual frames `[B, T, C]`, T = 26 at W = 100.

        With masks the pass is sparse: tokens are zero where inactive.
        """
        check_images(images, HEIGHT)
        if masks is None:
            return Features(_frames(self._run(images, [None] * len(self.stages))))
        sizes, visible = self.stage_sizes(*images.shape[2:]), masks.visible
        if visible is not None and rule == "any":  # a site is active where either of two is: about this share
            visible = 1 - (1 - visible) ** 2
        if images.requires_grad:  # layers over listed sites leave the gradient of hidden pixels open
            images = torch.where(masks.pixels, 0.0, images)
        windows = [stage.windows() for stage in cast(Iterable[Stage], self.stages)]
        sites = masked_storage(active_sites(masks.grid, sizes, rule), visible=visible, windows=windows)
        tokens = _frames(unpack_sites(self._run(images, sites), sites[-1]))
        return Features(tokens, active=sites[-1].active[:, 0, 0])

    def levels(self, images: Tensor, early: int, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `Encoder`."""
        check_images(images, HEIGHT)
        x = lower = images
        for behind, stage in enumerate(self.stages, 1):
            x = self.run_part(stage, x, None)
            lower = x if behind == early else lower
        return lower, _frames(x)

    def columns(self, tokens: Tensor) -> Tensor:
        """The tokens are one a column already."""
        return tokens

    def _run(self, images: Tensor, sites: Sequence[Sites | None]) -> Tensor:
        x = images
        for stage, at in zip(self.stages, sites, strict=True):
            x = self.run_part(stage, x, at)
        return x


def _frames(x: Tensor) -> Tensor:
    """Maps `[B, C, 1, T]` to frames `[B, T, C]`."""
    return x.squeeze(2).transpose(1, 2)


def _blocks(in_channels: int, out_channels: int, count: int) -> list[BasicBlock]:
    return [BasicBlock(out_channels if i else in_channels, out_channels) for i in range(count)]
