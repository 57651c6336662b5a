"""Pretraining methods: what a step computes. A method is one module of this package; see docs/new-method.md."""

import torch

from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.methods.base import EncoderMethod, MethodSpec, PretrainMethod, ViewSpec, in_passes, to_pixels
from rcmstr_fast.methods.registry import ALL, CNN, VIT, every_method, find, register, settings
from rcmstr_fast.methods.step import Batch, Collectives, Local, StepOutput
from rcmstr_fast.models.batch_norm import set_bn_groups

__all__ = [
    "ALL", "CNN", "VIT", "Batch", "Collectives", "EncoderMethod", "Local", "MethodSpec", "PretrainMethod",
    "StepOutput", "ViewSpec", "build_method", "every_method", "find", "in_passes", "register", "settings", "to_pixels",
]  # fmt: skip


def build_method(config: PretrainConfig, collectives: Collectives | None = None) -> PretrainMethod:
    """Make the method of a resolved configuration, with weights that depend on `config.seed` alone.

    Args:
        config: from `rcmstr_fast.config.resolve`.
        collectives: exchange between processes; None: a single process.
    Raises:
        ConfigError: `config.method` is not the configuration of the method that it names.
    """
    spec = find(config.method.name)
    if not isinstance(config.method, spec.config):
        got = type(config.method).__name__
        raise ConfigError(f"method must be a {spec.config.__name__} for method.name={spec.name}, got a {got}")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        method = spec.method(config, collectives or Local())
    set_bn_groups(method, config.method.bn_group_size)
    return method
