"""Tiny configurations that the tests of methods and trainer share."""

import torch

from rcmstr_fast.config import PretrainConfig, resolve
from rcmstr_fast.methods import Batch, find, settings

SMALL_MODEL = {"width": 0.25, "depth": 1, "projector_hidden": 32, "feature_dim": 16}


def tiny_config(encoder: str = "resnet29", batch: int = 4, name: str = "rcmstr", **method) -> PretrainConfig:
    """A resolved configuration of the smallest networks; keyword arguments are method fields, `preset` and `seed`."""
    config = PretrainConfig(preset=method.pop("preset", "paper"), seed=method.pop("seed", 0))
    config.model.encoder = encoder
    for field, value in SMALL_MODEL.items():
        setattr(config.model, field, value)
    config.method = settings(name, **{"queue_size": 64, **method})
    config.train.global_batch_size = batch
    return resolve(config)


def random_batch(config: PretrainConfig, batch: int = 4, epoch: int = 0, seed: int = 0) -> Batch:
    """Views of noise: query and key, and those a method makes itself are left to it."""
    generator = torch.Generator().manual_seed(seed)
    size = (batch, 3, config.model.height, config.model.image_width)
    wanted = [spec for spec in find(config.method.name).method.views(config) if not spec.permuted_of]
    noise = torch.rand((len(wanted), *size), generator=generator) * 2 - 1
    views = {spec.name: x for spec, x in zip(wanted, noise, strict=True)}
    return Batch(views, torch.arange(batch) + 10 * seed, epoch)
