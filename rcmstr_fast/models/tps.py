"""Thin-plate-spline rectifier: predicts 20 points along the text line and straightens the image between them.

The points on the output are fixed: ten along the top edge, ten along the bottom edge. A thin-plate spline that
maps them to the predicted points of the input is linear in the latter, so its whole grid is one precomputed matrix
times the predicted points (Shi et al., "Robust scene text recognition with automatic rectification", CVPR 2016).
Coordinates are in [-1, 1], x to the right, y down, -1 and 1 at the image's edges.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rcmstr_fast.config import ConfigError
from rcmstr_fast.models.batch_norm import GroupedBatchNorm

FIDUCIALS = 20


def fiducials(top: tuple[float, float] = (-1.0, -1.0), bottom: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Ten points on the line from y = top[0] (left) to top[1] (right), then ten on the bottom one: `[20, 2]` float64.

    The defaults are the points of the output, so predicting them gives the image back: the identity layout.
    """
    x = torch.linspace(-1, 1, FIDUCIALS // 2, dtype=torch.float64)
    lines = [torch.stack([x, torch.linspace(*line, len(x), dtype=torch.float64)], dim=1) for line in (top, bottom)]
    return torch.cat(lines)


#: The layout from which RARE and its successors start: the text line rises over half the image's height.
SLOPING = ((0.0, -1.0), (1.0, 0.0))


def grid_matrix(height: int, width: int) -> Tensor:
    """The matrix `[height * width, 20]` float32 that maps predicted points to the sampling grid."""
    points = fiducials()
    system = torch.zeros(FIDUCIALS + 3, FIDUCIALS + 3, dtype=torch.float64)
    system[:FIDUCIALS] = _basis(points, points)
    system[FIDUCIALS:, :FIDUCIALS] = torch.cat([torch.ones(FIDUCIALS, 1), points], dim=1).T
    y = (torch.arange(height, dtype=torch.float64) * 2 + 1) / height - 1
    x = (torch.arange(width, dtype=torch.float64) * 2 + 1) / width - 1
    pixels = torch.cartesian_prod(y, x).flip(1)
    return (_basis(pixels, points) @ torch.linalg.inv(system)[:, :FIDUCIALS]).float()


def _basis(at: Tensor, points: Tensor) -> Tensor:
    """r^2 log r to each point, then 1, x, y: `[n, 23]`."""
    square = (at[:, None] - points).square().sum(2)
    return torch.cat([0.5 * torch.xlogy(square, square), torch.ones(len(at), 1), at], dim=1)


class TPSRectifier(nn.Module):
    """Images to rectified images of the same size; 1,693,544 parameters; float32 also inside autocast."""

    matrix: Tensor

    def __init__(
        self,
        height: int,
        width: int,
        *,
        layout: Tensor | None = None,
        frozen: bool = False,
        align_corners: bool = False,
    ) -> None:
        """Make a rectifier for images of height x width.

        Args:
            height: pixels.
            width: pixels.
            layout: `[20, 2]` points predicted at the start; None: the identity layout, output = input.
            frozen: no gradient, and evaluation mode whatever `train()` asks for.
            align_corners: of the sampling; with True the points (-1, -1) and (1, 1) lie on the centres of the corner
                pixels, as in DTRB and RCLSTR, and the identity layout magnifies by W/(W-1) about the centre.
        """
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in ((3, 64), (64, 128), (128, 256), (256, 512)):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), GroupedBatchNorm(n_out, dims=2), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if n_out < 512 else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.localisation = nn.Sequential(*layers)
        self.fc1 = nn.Linear(512, 256)
        self.fc2 = nn.Linear(256, 2 * FIDUCIALS)
        self.register_buffer("matrix", grid_matrix(height, width), persistent=False)
        self.size = height, width
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc2.weight)
        with torch.no_grad():
            self.fc2.bias.copy_((fiducials() if layout is None else layout).flatten())
        self.frozen, self.align_corners = frozen, align_corners
        if frozen:
            self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TPSRectifier":
        """Set the mode; a frozen rectifier stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> Tensor:
        """images `[B, 3, H, W]` to `[B, 3, H, W]`; outside the image its border is repeated.

        Raises:
            ValueError: images do not have the size the rectifier was made for.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, *self.size):
            raise ValueError(f"images must be [B, 3, {self.size[0]}, {self.size[1]}], got {list(images.shape)}")
        with torch.autocast(images.device.type, enabled=False):
            images = images.to(self.matrix.dtype)
            points = self.fc2(F.relu(self.fc1(self.localisation(images)))).unflatten(1, (FIDUCIALS, 2))
            grid = (self.matrix @ points).unflatten(1, self.size)
            return F.grid_sample(images, grid, padding_mode="border", align_corners=self.align_corners)


def load_rectifier(rectifier: TPSRectifier, path: str) -> None:
    """Fill a rectifier from a safetensors file that holds exactly its state.

    Raises:
        ValueError: one line: the file is missing, no safetensors file, or holds something else.
    """
    if not Path(path).is_file():
        raise ConfigError(f"model.tps_checkpoint must be a safetensors file, found no file {path!r}")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"model.tps_checkpoint must be a safetensors file, cannot read {path!r}: {error}") from error
    expected = rectifier.state_dict()
    if state.keys() != expected.keys():
        odd = ", ".join(sorted(state.keys() ^ expected.keys())[:3])
        raise ConfigError(
            f"model.tps_checkpoint {path!r} must hold a TPS rectifier of this program; differing names: {odd}"
        )
    for name, value in expected.items():
        if state[name].shape != value.shape:
            got = list(state[name].shape)
            raise ConfigError(f"model.tps_checkpoint {path!r}: {name} must be {list(value.shape)}, got {got}")
    rectifier.load_state_dict(state)
