"""The choice of the tiles of the masked convolution: those that the static model ranks near the table's own are tried.

A choice replaces the entry that the widest layers of a ResNet take, which have most of the work. On a CPU no tile is used.
"""

import torch

from rcmstr_fast.kernels.masked import tiles
from rcmstr_fast.kernels.masked.tiles import ConvTile
from rcmstr_fast.ops import tile_choice, triton_backend
from rcmstr_fast.tuning.choices import Setting

#: Tiles of the forward and the data gradient. For 4x26 sites of 512 channels, 70 % hidden, the model gives an H200 0.051 ms
#: with its own 128x256, 0.048 with 128x128, 0.043 with 64x256 and 0.042 with 64x128, whose loads it takes as in time though
#: they ask more of the L2 cache; an A100 0.175 ms with its own and 0.179 with 64x128.
_ROWS = (
    ConvTile(64, 256, 64, 4, 3),
    ConvTile(64, 128, 64, 4, 3),
    ConvTile(128, 128, 64, 8, 3),
    ConvTile(128, 128, 64, 8, 4),
    ConvTile(128, 256, 64, 8, 3),
)
#: Tiles of the weight gradient: 0.041 ms with the H200's own, 0.040 with 128x256; 0.150 with the A100's own, 0.154 with
#: 64x128.
_WEIGHT = (
    ConvTile(128, 256, 64, 8, 3),
    ConvTile(128, 128, 64, 8, 3),
    ConvTile(128, 128, 32, 8, 4),
    ConvTile(64, 128, 32, 4, 4),
)


def _family(setting: Setting) -> int | None:
    """Family of the GPU that runs a masked pass, or None where none does."""
    if setting.device != "cuda" or setting.visible is None or not setting.stages or triton_backend.reasons():
        return None
    from rcmstr_fast.kernels import runtime  # needs triton

    return runtime.architecture(torch.device(setting.device))


def _rows_place(setting: Setting) -> tile_choice.Key | None:
    family = _family(setting)
    return None if family is None else (family, max(n for known, n in tiles.ROWS if known == family))


def _weight_place(setting: Setting) -> tile_choice.Key | None:
    family = _family(setting)
    return None if family is None else (family, tiles.WIDEST)


ROWS = tile_choice.declare(
    "masked_conv.tile_rows",
    "tile of the masked convolution",
    "masked_pass",
    1.15,
    tiles.ROWS,
    _rows_place,
    lambda key, own: _ROWS,
    ("masked_conv_norm", "triton"),
)
WEIGHT = tile_choice.declare(
    "masked_conv.tile_weight",
    "tile of the masked convolution's weight gradient",
    "masked_pass",
    1.1,
    tiles.WEIGHT,
    _weight_place,
    lambda key, own: _WEIGHT,
    ("masked_conv_norm", "triton"),
)
