"""Which of our architectures a foreign state dict holds: every layout is compared by names and shapes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from rcmstr_fast.config import ModelConfig
from rcmstr_fast.exchange import layouts
from rcmstr_fast.models import SIZES

#: project -> prefixes of its checkpoints before the names of `layouts`, the usual one first
PREFIXES = {
    "dtrb": ("module.", "", "model."),
    "rclstr": ("module.encoder_q.", "encoder_q.", "module.", ""),
    "dig": ("encoder.", "", "module.encoder.", "model.encoder."),
    "timm": ("", "encoder.", "model.encoder.", "module.", "backbone."),
    "moco": ("module.encoder_q.", "module.base_encoder.", "encoder_q.", "base_encoder.", "module.", ""),
}
_LAYOUTS = {"dtrb": ("dtrb",), "rclstr": ("dtrb",), "dig": ("dig",), "timm": ("timm",), "moco": ("dtrb", "timm")}
#: Luminance of ITU-R 601, by which Pillow makes grey pictures.
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Candidate:
    """A layout and an architecture, compared with a state dict.

    Attributes:
        layout: dtrb, timm or dig.
        prefix: before every foreign name.
        model: the architecture.
        names: our name -> foreign name, prefix included.
        fitting: our names whose foreign tensor is there with the right shape.
    """

    layout: str
    prefix: str
    model: ModelConfig
    names: dict[str, str]
    fitting: frozenset[str]

    @property
    def share(self) -> float:
        """Share of the expected tensors that fit."""
        return len(self.fitting) / len(self.names)

    def describe(self) -> str:
        """Layout, architecture and how much of it is there."""
        model = self.model
        size = f"width {model.width:g}" if model.encoder == "resnet29" else f"depth {model.depth}"
        return f"{self.layout} {model.encoder} {size} ({len(self.fitting)} of {len(self.names)} tensors fit)"


def best_of(
    state: dict[str, Tensor], project: str, image_width: int, sequence: bool
) -> tuple[list[Candidate], dict[str, Tensor]]:
    """Compare a state dict with everything the project's checkpoints may hold.

    Args:
        state: foreign name -> tensor.
        project: a key of `PREFIXES`.
        image_width: pixels; 0: what the file says, else the usual one.
        sequence: the LSTM layers belong to the encoder.
    Returns:
        Candidates, the best fit first, one an architecture; and the state as the best one reads it (`adapted`).
    """
    return _ranked(state, _LAYOUTS[project], PREFIXES[project], image_width, sequence)


def nearest(state: dict[str, Tensor], count: int) -> list[Candidate]:
    """The architectures of all layouts that a state dict comes nearest to, whatever project it was said to be of."""
    layouts_of_all = tuple(dict.fromkeys(layout for several in _LAYOUTS.values() for layout in several))
    prefixes = tuple(dict.fromkeys(prefix for several in PREFIXES.values() for prefix in several))
    return _ranked(state, layouts_of_all, prefixes, 0, False)[0][:count]


def _ranked(
    state: dict[str, Tensor], names: Sequence[str], prefixes: Sequence[str], image_width: int, sequence: bool
) -> tuple[list[Candidate], dict[str, Tensor]]:
    found: dict[str, tuple[Candidate, dict[str, Tensor]]] = {}
    for layout in names:
        for prefix in prefixes:
            read = adapted(state, prefix, layout)
            for model in _architectures(read, prefix, layout, image_width, sequence):
                candidate = _compare(read, prefix, layout, model)
                key = candidate.describe().split(" (")[0]
                if key not in found or candidate.share > found[key][0].share:
                    found[key] = candidate, read
    total = sum(x.numel() for x in state.values())
    ranked = sorted(found.values(), key=lambda pair: (-pair[0].share, _distance(pair[0].model, total)))
    return [candidate for candidate, _ in ranked], ranked[0][1]


def _distance(model: ModelConfig, numbers: int) -> float:
    """How far a network is from a number of parameters, as the logarithm of their ratio."""
    own = sum(math.prod(shape) for shape in layouts.shapes_of(model).values())
    return abs(math.log(own / max(numbers, 1)))


def _compare(state: dict[str, Tensor], prefix: str, layout: str, model: ModelConfig) -> Candidate:
    shapes = layouts.shapes_of(model)
    table = {"dtrb": layouts.dtrb_names, "timm": layouts.timm_names, "dig": layouts.dig_names}[layout](shapes)
    names = layouts.with_prefix(table, prefix)
    fits = frozenset(x for x, theirs in names.items() if theirs in state and tuple(state[theirs].shape) == shapes[x])
    return Candidate(layout, prefix, model, names, fits)


def _architectures(
    state: dict[str, Tensor], prefix: str, layout: str, image_width: int, sequence: bool
) -> Iterator[ModelConfig]:
    if layout == "dtrb":
        grid = state.get(f"{prefix}Transformation.GridGenerator.P_hat")
        rectified = any(name.startswith(f"{prefix}Transformation.LocalizationNetwork.") for name in state)
        last = state.get(f"{prefix}SequenceModeling.1.linear.bias")
        for width in (1.0, 0.5, 0.25, 0.125):
            yield ModelConfig(
                encoder="resnet29",
                width=width,
                image_width=image_width or (len(grid) // 32 if grid is not None else 100),
                tps="frozen" if rectified else "none",
                tps_checkpoint="random" if rectified else "",
                tps_align_corners=rectified,
                sequence="bilstm" if sequence else "none",
                sequence_units=len(last) if sequence and last is not None else 256,
            )
        return
    blocks = {
        name.removeprefix(f"{prefix}blocks.").split(".")[0] for name in state if name.startswith(f"{prefix}blocks.")
    }
    positions = state.get(f"{prefix}pos_embed")
    told = positions.shape[1] // 8 * 4 if positions is not None and positions.dim() == 3 else 128
    for encoder in SIZES:
        yield ModelConfig(
            encoder=cast(Any, encoder),
            depth=len(blocks) or 12,
            image_width=image_width or max(told, 16),
            class_token=f"{prefix}cls_token" in state,
            final_norm=f"{prefix}norm.weight" in state,
        )


def adapted(state: dict[str, Tensor], prefix: str, layout: str) -> dict[str, Tensor]:
    """The state with what is written differently, but means the same, in the form of our tensors.

    - A first convolution of grey pictures becomes one of RGB pictures that weighs them to grey.
    - Query and value biases apart (DiG, BEiT) become one bias of query, key (zero) and value.
    - A class token's own position is added to it; the positions left are those of the patches.
    - DiG's mask token `[1, 1, C]` becomes `[C]`.
    """
    made = dict(state)
    if layout == "dtrb":
        for name in ("FeatureExtraction.ConvNet.conv0_1.weight", "Transformation.LocalizationNetwork.conv.0.weight"):
            weight = made.get(prefix + name)
            if weight is not None and weight.dim() == 4 and weight.shape[1] == 1:
                made[prefix + name] = weight * weight.new_tensor(_GREY)[None, :, None, None]
        return made
    for name, query in state.items():
        value = state.get(name.removesuffix("q_bias") + "v_bias")
        if name.startswith(prefix) and name.endswith(".attn.q_bias") and value is not None:
            joined = torch.cat([query, torch.zeros_like(query), value])
            for part in ("q_bias", "v_bias"):
                del made[name.removesuffix("q_bias") + part]
            made[name.removesuffix("q_bias") + "qkv.bias"] = joined
    token, positions = made.get(f"{prefix}cls_token"), made.get(f"{prefix}pos_embed")
    if token is not None and positions is not None and positions.dim() == 3 and positions.shape[1] % 8 == 1:
        made[f"{prefix}cls_token"] = token + positions[:, :1]
        made[f"{prefix}pos_embed"] = positions[:, 1:]
    mask = made.get(f"{prefix}mask_token")
    if mask is not None:
        made[f"{prefix}mask_token"] = mask.flatten()
    return made
