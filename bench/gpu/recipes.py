"""Configurations of the pieces."""

from typing import Any

from bench.gpu.setting import Setting
from rcmstr_fast.config import ConfigError, PretrainConfig, resolve
from rcmstr_fast.methods import settings

#: Values by dotted field of PretrainConfig, such as {"model.encoder": "vit_tiny"}.
Fields = dict[str, Any]


def configured(values: Fields, changes: tuple[str, ...] = ()) -> PretrainConfig:
    """A resolved configuration from the defaults and values by dotted field.

    Args:
        values: dotted field -> value.
        changes: `dotted.field=value` (YAML values), set after them.
    Raises:
        ConfigError: an unknown field, or values that do not fit.
    """
    import yaml

    parsed = {name: yaml.safe_load(text) for name, _, text in (change.partition("=") for change in changes)}
    fields = values | parsed
    config = PretrainConfig(method=settings(fields.get("method.name", "rcmstr")))
    for name, value in fields.items():
        *outer, last = name.split(".")
        place: Any = config
        for part in outer:
            place = getattr(place, part, None)
        if not hasattr(place, last):
            raise ConfigError(f"unknown field {name}")
        setattr(place, last, value)
    return resolve(config)


def dotted(nested: dict[str, Any], prefix: str = "") -> Fields:
    """Values by dotted field of a recipe's nested ones."""
    found: Fields = {}
    for name, value in nested.items():
        found |= dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def recipe(setting: Setting, encoder: str, method: str = "rcmstr", batch: int = 512, **train: Any) -> Fields:
    """The training size, or the smallest one in a dry run."""
    values: Fields = {"preset": "fast", "model.encoder": encoder, "method.name": method}
    values |= {"train.global_batch_size": batch, "train.device": setting.device}
    values |= {f"train.{name}": value for name, value in train.items()}
    return values | (tiny() if setting.dry else {})


def tiny() -> Fields:
    """What makes a configuration as small as it can be."""
    return {
        "model.width": 0.25,
        "model.depth": 1,
        "model.projector_hidden": 32,
        "model.feature_dim": 16,
        "method.queue_size": 64,
        "train.global_batch_size": 4,
        "train.precision": "fp32",
    }
