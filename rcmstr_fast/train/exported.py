"""The networks of an exported file, built again."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rcmstr_fast.config import ConfigError, ModelConfig
from rcmstr_fast.fields import check_fields
from rcmstr_fast.models import Encoder, build_encoder, build_rectifier
from rcmstr_fast.train.export import read_export


def load_encoder(path: str | Path) -> tuple[Encoder, nn.Module, dict[str, Any]]:
    """Rebuild the exported encoder.

    Args:
        path: an `encoder.safetensors` or the run folder that holds one.
    Returns:
        encoder and rectifier (`nn.Identity` for none) in evaluation mode on the CPU, and the header.
    Raises:
        ConfigError: the file is missing, cut off, foreign, its tensors do not fit its header, or one of them has
            values that are not finite.
    """
    file, header, tensors = read_export(path)
    try:
        # The exported weights are those of the rectifier, so its own checkpoint is not asked for again.
        model = ModelConfig(**{**header["config"]["model"], "tps_checkpoint": "random"})
        check_fields(model)
        encoder, rectifier = build_encoder(model), build_rectifier(model)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{file}: its header does not describe an encoder of this version ({error})") from error
    for name, module in (("encoder", encoder), ("rectifier", rectifier)):
        held = {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}
        _fill(module, held, f"{file}: {name}")
    return encoder.eval(), rectifier.eval(), header


def _fill(module: nn.Module, held: dict[str, Tensor], where: str) -> None:
    """Load a state dict after naming what does not fit."""
    wanted = module.state_dict()
    for key in sorted(wanted.keys() | held.keys()):
        if key not in held or key not in wanted:
            raise ConfigError(f"{where}: tensor {key} is {'missing' if key in wanted else 'not part of the network'}")
        if held[key].shape != wanted[key].shape:
            expected, got = list(wanted[key].shape), list(held[key].shape)
            raise ConfigError(f"{where}: tensor {key} must be {expected}, got {got}")
    with torch.no_grad():
        module.load_state_dict(held)
