"""What other projects call our tensors.

Names on our side are those of `encoder.safetensors` (`encoder.*`, `rectifier.*`). The other side is the state dict of
the named project: DTRB's `Model` (clovaai/deep-text-recognition-benchmark, also the base of RCLSTR), timm's
`VisionTransformer`, PARSeq's encoder (a timm `VisionTransformer`), OpenOCR's `ViT` and DiG's pretraining encoder.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from rcmstr_fast import models
from rcmstr_fast.config import ModelConfig, resolve_model
from rcmstr_fast.models.tps import FIDUCIALS, fiducials

#: Tensors that a file may lack: they start at known values.
OPTIONAL = ("mask_token", "pos_embed", "num_batches_tracked")

_BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
#: (our stage, our first layer in it, blocks, DTRB's number of the layer)
_LAYERS = ((1, 0, 1, 1), (2, 0, 2, 2), (3, 0, 5, 3), (3, 6, 3, 4))
#: our unit -> DTRB's convolution and batch norm, of the convolutions between the blocks
_UNITS = {
    "stages.0.layers.0": ("conv0_1", "bn0_1"),
    "stages.0.layers.1": ("conv0_2", "bn0_2"),
    "stages.1.layers.1": ("conv1", "bn1"),
    "stages.2.layers.2": ("conv2", "bn2"),
    "stages.3.layers.5": ("conv3", "bn3"),
    "stages.4.layers.0": ("conv4_1", "bn4_1"),
    "stages.5.layers.0": ("conv4_2", "bn4_2"),
}


def tensors_of(encoder: nn.Module, rectifier: nn.Module) -> dict[str, Tensor]:
    """The state of both, by the names of `encoder.safetensors`."""
    named = {f"encoder.{name}": x for name, x in encoder.state_dict().items()}
    return named | {f"rectifier.{name}": x for name, x in rectifier.state_dict().items()}


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of encoder and rectifier, without making their weights."""
    return _shapes_of(dataclasses.astuple(resolve_model(model)))


@functools.cache
def _shapes_of(fields: tuple) -> dict[str, tuple[int, ...]]:
    model = ModelConfig(*fields)
    with torch.device("meta"):
        encoder = models.build_encoder(model)
        rectifier = models.TPSRectifier(model.height, model.image_width) if model.tps != "none" else nn.Identity()
    return {name: tuple(x.shape) for name, x in tensors_of(encoder, rectifier).items()}


def dtrb_names(names: Iterable[str]) -> dict[str, str]:
    """Our names of a ResNet-29, its LSTM layers and its rectifier to those of DTRB's `Model`; others are left out."""
    table: dict[str, str] = {}
    for unit, (conv, bn) in _UNITS.items():
        table |= _unit(f"encoder.{unit}", f"FeatureExtraction.ConvNet.{conv}", f"FeatureExtraction.ConvNet.{bn}")
    for stage, first, blocks, number in _LAYERS:
        for i in range(blocks):
            ours = f"encoder.stages.{stage}.layers.{first + i}"
            theirs = f"FeatureExtraction.ConvNet.layer{number}.{i}"
            for half in "12":
                table |= _unit(f"{ours}.conv{half}", f"{theirs}.conv{half}", f"{theirs}.bn{half}")
            table |= _unit(f"{ours}.shortcut", f"{theirs}.downsample.0", f"{theirs}.downsample.1")
    return {name: found for name in names if (found := table.get(name) or _dtrb_rest(name))}


def _unit(ours: str, conv: str, bn: str) -> dict[str, str]:
    return {f"{ours}.conv.weight": f"{conv}.weight"} | {f"{ours}.bn.{part}": f"{bn}.{part}" for part in _BN}


def _dtrb_rest(name: str) -> str | None:
    """DTRB's names of what follows and precedes the convolutions: LSTM layers and rectifier."""
    for ours, theirs in (
        ("encoder.sequence.", "SequenceModeling."),
        ("rectifier.localisation.", "Transformation.LocalizationNetwork.conv."),
        ("rectifier.fc1.", "Transformation.LocalizationNetwork.localization_fc1.0."),
        ("rectifier.fc2.", "Transformation.LocalizationNetwork.localization_fc2."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return None


def dtrb_grid(height: int, width: int) -> dict[str, Tensor]:
    """The two fixed buffers of DTRB's grid generator for images of height x width, float32.

    `P_hat` `[height * width, 23]` holds 1, x, y and r^2 log r to each of the 20 points for every pixel, and
    `inv_delta_C` `[23, 23]` solves for the spline through the points (Shi et al., CVPR 2016).
    """
    points = fiducials()
    y, x = ((torch.arange(n, dtype=torch.float64) * 2 + 1) / n - 1 for n in (height, width))
    pixels = torch.cartesian_prod(y, x).flip(1)
    system = torch.zeros(FIDUCIALS + 3, FIDUCIALS + 3, dtype=torch.float64)
    system[:FIDUCIALS] = _spline_terms(points, points)
    system[FIDUCIALS : FIDUCIALS + 2, 3:], system[-1, 3:] = points.T, 1.0
    made = {"inv_delta_C": torch.linalg.inv(system), "P_hat": _spline_terms(pixels, points)}
    return {f"Transformation.GridGenerator.{name}": x.float() for name, x in made.items()}


def _spline_terms(at: Tensor, points: Tensor) -> Tensor:
    """1, x, y and r^2 log r to each point: `[n, 23]`."""
    square = (at[:, None] - points).square().sum(2)
    return torch.cat([torch.ones(len(at), 1, dtype=at.dtype), at, 0.5 * torch.xlogy(square, square)], dim=1)


def timm_names(names: Iterable[str]) -> dict[str, str]:
    """Our names of a vision transformer to timm's; the mask token, rectifier and LSTM layers have none."""
    own = ("encoder.mask_token", "encoder.sequence.")
    return {
        name: name.removeprefix("encoder.")
        for name in names
        if name.startswith("encoder.") and not name.startswith(own)
    }


def dig_names(names: Iterable[str]) -> dict[str, str]:
    """Our names to those of DiG's encoder: timm's and the mask token `[1, 1, C]`."""
    return timm_names(names) | {name: "mask_token" for name in names if name == "encoder.mask_token"}


def with_prefix(table: Mapping[str, str], prefix: str) -> dict[str, str]:
    """The same table, a prefix before every foreign name."""
    return {ours: prefix + theirs for ours, theirs in table.items()}
