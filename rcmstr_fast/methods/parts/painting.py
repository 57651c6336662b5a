"""Painting a picture from features: content restyled by another picture's statistics, a decoder, a discriminator."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.ops.precision import full_precision

#: Under a square root.
EPS = 1e-5


def normalised(frames: Tensor) -> Tensor:
    """Instance normalisation: frames [B, T, C] with mean 0 and deviation 1 over T in each image and channel."""
    mean = frames.mean(1, keepdim=True)
    variance = (frames - mean).square().mean(1, keepdim=True)
    return (frames - mean) / (variance + EPS).sqrt()


def restyled(content: Tensor, neighbour: Tensor) -> tuple[Tensor, Tensor]:
    """The content of one picture in the style of its neighbour.

    Each frame of the content attends to the neighbour's frames of like content; the weighted mean and deviation of
    what these are before normalisation is its style: A = softmax(n(c) n(s)^T / sqrt(C)), m = A s,
    d = sqrt(A s^2 - m^2), and the result is d n(c) + m.

    Args:
        content: [B, T, C] frames. Receives a gradient.
        neighbour: [B, T', C] frames s. Receives a gradient.
    Returns:
        [B, T, C] float32 (float64 for float64 frames), and the attention A [B, T, T'].
    """
    c, s = full_precision(content), full_precision(neighbour)
    own, keys = normalised(c), normalised(s)
    attention = (own @ keys.transpose(1, 2) / c.shape[2] ** 0.5).softmax(2)
    mean = attention @ s
    # About the middle of the neighbour, which changes no deviation but keeps a difference of squares small.
    middle = s.mean(1, keepdim=True)
    square = attention @ (s - middle).square() - (mean - middle).square()
    return (square.clamp(min=0) + EPS).sqrt() * own + mean, attention


class Painter(nn.Module):
    """Frames [B, width / 4 + 1, C] to pictures [B, 3, height, width] in [-1, 1].

    Neighbouring frames are averaged to columns of 4 pixels; three times the map is doubled in height, the last two
    times in width too, each followed by a 3x3 convolution. No layer normalises: that would take the style off.

    Args:
        channels: C.
        size: (height, width) of the pictures, multiples of 8 and 4.
        width: channels of the first map; halved at each doubling.
    """

    def __init__(self, channels: int, size: tuple[int, int], width: int) -> None:
        super().__init__()
        self.rows = size[0] // 8
        sizes = [max(8, width // 2**i) for i in range(4)]
        self.enter = nn.Linear(channels, sizes[0] * self.rows)
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.leave = nn.Conv2d(sizes[-1], 3, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        """See the class."""
        columns = 0.5 * (frames[:, 1:] + frames[:, :-1])
        x = self.enter(columns).unflatten(2, (-1, self.rows)).permute(0, 2, 3, 1)
        for number, convolution in enumerate(self.convolutions):
            x = x.repeat_interleave(2, dim=2)
            x = x.repeat_interleave(2, dim=3) if number else x
            x = F.leaky_relu(convolution(x), 0.2)
        return torch.tanh(full_precision(self.leave(x)))


class Discriminator(nn.Module):
    """Pictures [B, 3, h, w] to scores of their patches [B, 1, h / 8, w / 8]: high where one looks true.

    Args:
        width: channels of the first map; doubled at each halving of the size.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (3, width, 2 * width, 4 * width)
        halving = [nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(sizes)]
        self.convolutions = nn.ModuleList([*halving, nn.Conv2d(sizes[-1], 1, 3, padding=1)])

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        *between, last = self.convolutions
        x = images
        for convolution in between:
            x = F.leaky_relu(convolution(x), 0.2)
        return full_precision(last(x))
