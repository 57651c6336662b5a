"""Small encoders and recognisers as files."""

import torch
from torch import nn

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ModelConfig, PretrainConfig, resolve, resolve_model
from rcmstr_fast.evaluation.recogniser import Recogniser
from rcmstr_fast.exchange.networks import Networks
from rcmstr_fast.models import build_encoder, build_rectifier
from rcmstr_fast.train.export import export_encoder
from tests.exchange.foreign import shaken

CNN = {"encoder": "resnet29", "width": 0.25, "image_width": 36}
VIT = {"encoder": "vit_tiny", "depth": 1, "image_width": 32}
TPS = {"tps": "frozen", "tps_checkpoint": "random", "tps_align_corners": True}


def networks(seed: int = 3, **model) -> tuple[nn.Module, nn.Module, ModelConfig]:
    """Encoder, rectifier (whose points are moved a little) and their configuration."""
    torch.manual_seed(seed)
    config = resolve_model(ModelConfig(**model))
    encoder, rectifier = shaken(build_encoder(config), seed), shaken(build_rectifier(config), seed)
    if config.tps != "none":
        with torch.no_grad():
            rectifier.fc2.weight.normal_(std=0.02)
    return encoder, rectifier, config


def write_encoder(path, **model):
    """An encoder.safetensors; its networks and configuration."""
    encoder, rectifier, config = networks(**model)
    whole = resolve(PretrainConfig(model=config))
    export_encoder(Networks(encoder, rectifier), path, whole, 7)
    return encoder, rectifier, config


def write_recogniser(path, decoder="ctc", charset="36", facts=None, normalise=False, max_length=5, **model):
    """A recogniser.safetensors of random weights that writes something; the recogniser."""
    encoder, rectifier, config = networks(**model)
    made = Recogniser(
        config, rectifier, encoder, decoder, Charset.load(charset), hidden=8, normalise=normalise, max_length=max_length
    ).eval()
    with torch.no_grad():
        made.decoder.classifier.weight.mul_(8)
    made.save(path, facts or {})
    return made


def pictures(height: int, width: int, count: int = 3) -> torch.Tensor:
    """Normalised images [B, 3, H, W]."""
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
