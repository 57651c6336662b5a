"""Pretraining that starts from an encoder that is there already (`train.init`)."""

import torch
from torch import nn

from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.methods.protocol import PretrainMethod
from rcmstr_fast.train.exported import load_encoder

#: Fields of the network that must be those of the file.
_FIELDS = (
    "encoder",
    "width",
    "depth",
    "height",
    "image_width",
    "tps_align_corners",
    "sequence",
    "sequence_units",
    "class_token",
    "final_norm",
)


def check_start(config: PretrainConfig) -> None:
    """Check that the file of `train.init` holds the network of the configuration, before anything is written.

    Args:
        config: resolved.
    Raises:
        ConfigError: the file cannot be read, or naming every field that differs, with what to set.
    """
    if not config.train.init:
        return
    _, rectifier, header = load_encoder(config.train.init)
    held, wanted = header["config"]["model"], config.model
    differing = [name for name in _FIELDS if name in held and held[name] != getattr(wanted, name, held[name])]
    if not isinstance(rectifier, nn.Identity) and wanted.tps == "none":
        differing.append("tps")
    if differing:
        flags = " ".join(f"--model.{name} {held[name]}" for name in differing)
        raise ConfigError(f"train.init: {config.train.init} holds another network than the run has; set {flags}")


def start_from(method: PretrainMethod, config: PretrainConfig) -> PretrainMethod:
    """Give every encoder and rectifier inside a method, online and momentum, the weights of `train.init`.

    Args:
        method: of the same network, see `check_start`.
        config: checked; without `train.init` nothing happens.
    Returns:
        `method`.
    """
    if not config.train.init:
        return method
    encoder, rectifier, _ = load_encoder(config.train.init)
    for source in (encoder, rectifier):
        state = source.state_dict()
        alike = [x for x in method.modules() if type(x) is type(source) and x.state_dict().keys() == state.keys()]
        with torch.no_grad():
            for module in alike if state else []:
                module.load_state_dict(state)
    return method
