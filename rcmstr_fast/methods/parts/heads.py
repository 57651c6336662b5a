"""Projectors and predictors by kind, and the mapping of frames to instances (SeqCLR, section 4)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from rcmstr_fast.config import ModelConfig, num_frames, require
from rcmstr_fast.fields import number
from rcmstr_fast.methods.parts.windows import pooling_windows
from rcmstr_fast.models.batch_norm import GroupedBatchNorm
from rcmstr_fast.models.projector import BiLSTMProjector

Kind = Literal["none", "linear", "mlp", "bilstm"]
Mapping = Literal["all", "window", "frame", "flatten"]


@dataclass
class InstanceSettings:
    """Fields of a method that compares instances of an image.

    Attributes:
        instances: all (one, the mean of the frames), window (`windows` adaptive averages), frame (each), or flatten
            (one, all frames side by side).
        windows: instances an image with instances=window.
    """

    instances: Mapping = "window"
    windows: int = number(5, low=1)

    def check_windows(self, model: ModelConfig) -> None:
        """Raise ConfigError where there are more windows than frames."""
        if self.instances == "window":
            check_windows(self.name, self.windows, model)  # type: ignore[attr-defined]


def check_windows(method: str, windows: int, model: ModelConfig) -> None:
    """Raise ConfigError where there are more windows than frames of an image."""
    frames = num_frames(model)
    expected = f"method.windows must be at most the {frames} frames of an image for method {method}"
    require(windows <= frames, expected, windows)


class Instances(nn.Module):
    """Frames to instances; a product with fixed weights, so that every device and precision has it.

    Args:
        kind: as in `InstanceSettings`.
        frames: T.
        windows: T' for kind=window.
    """

    def __init__(self, kind: Mapping, frames: int, windows: int = 1) -> None:
        super().__init__()
        self.kind = kind
        self.weights: Tensor
        weights = torch.zeros(windows if kind == "window" else 1, frames)
        for row, (start, end) in zip(weights, pooling_windows(frames, len(weights)), strict=True):
            row[start:end] = 1.0 / (end - start)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Frames `[B, T, C]` to instances `[B, n, C]` (flatten: `[B, 1, T C]`)."""
        if self.kind == "frame":
            return frames
        if self.kind == "flatten":
            return frames.flatten(1).unsqueeze(1)
        return self.weights.to(frames.dtype) @ frames


def build_head(
    kind: Kind,
    in_channels: int,
    out_channels: int,
    *,
    hidden: int = 0,
    layers: int = 2,
    norm: bool = True,
    last_norm: bool = False,
    bias: bool = True,
) -> nn.Module:
    """A projector or predictor of rows or frames `[B, .., C]`.

    Args:
        kind: none (the identity), linear, mlp, or bilstm (two bidirectional layers of `hidden` units and a linear
            layer to `out_channels`, without it where 0).
        in_channels: C.
        out_channels: of the result.
        hidden: width of the layers between; 0: in_channels.
        layers: linear layers of an mlp.
        norm: batch norm before each ReLU of an mlp; statistics are over all rows of a group of images, so rows must
            keep their image as the first axis.
        last_norm: also after the last layer, without weight and bias.
        bias: of the linear layers of an mlp that no batch norm follows.
    """
    hidden = hidden or in_channels
    if kind == "none":
        return nn.Identity()
    parts: list[nn.Module] = []
    if kind == "bilstm":
        parts.append(BiLSTMProjector(in_channels, hidden))
        if out_channels:
            parts.append(nn.Linear(hidden, out_channels))
    else:
        sizes = (in_channels, *([hidden] * (layers - 1) if kind == "mlp" else ()), out_channels)
        for number_, (n_in, n_out) in enumerate(pairwise(sizes), 1):
            last = number_ == len(sizes) - 1
            normed = last_norm if last else norm and kind == "mlp"
            parts.append(nn.Linear(n_in, n_out, bias=bias and not normed))
            if normed:
                parts.append(GroupedBatchNorm(n_out, dims=1, affine=not last))
            if not last:
                parts.append(nn.ReLU())
    return nn.Sequential(*parts)
