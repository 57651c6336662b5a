"""Tiny configurations that the tests of methods and trainer share."""

from dataclasses import fields

import torch

from rcmstr_fast.config import PretrainConfig, resolve
from rcmstr_fast.methods import StepBatch


def tiny_config(encoder: str = "resnet29", batch: int = 4, **method) -> PretrainConfig:
    """A resolved configuration of the smallest networks; keyword arguments are method fields."""
    config = PretrainConfig(preset=method.pop("preset", "paper"), seed=method.pop("seed", 0))
    config.model.encoder, config.model.width, config.model.depth = encoder, 0.25, 1
    config.model.projector_hidden, config.model.feature_dim = 32, 16
    config.method.queue_size = 64
    config.train.global_batch_size = batch
    known = {f.name for f in fields(config.method)}
    for name, value in method.items():
        assert name in known, name
        setattr(config.method, name, value)
    return resolve(config)


def random_batch(config: PretrainConfig, batch: int = 4, epoch: int = 0, seed: int = 0) -> StepBatch:
    """Views of noise."""
    generator = torch.Generator().manual_seed(seed)
    size = (2, batch, 3, config.model.height, config.model.image_width)
    return StepBatch(torch.rand(size, generator=generator) * 2 - 1, torch.arange(batch) + 10 * seed, epoch)
