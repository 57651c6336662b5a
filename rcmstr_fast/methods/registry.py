"""The methods there are: each module of this package may register some, and is looked into when one is asked for.

A method that lives elsewhere is registered by importing its module first.
"""

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from rcmstr_fast.config import ConfigError, MethodConfig, PretrainConfig
from rcmstr_fast.methods.protocol import Collectives, Local, MethodSpec, PretrainMethod
from rcmstr_fast.models.batch_norm import set_bn_groups

M = TypeVar("M", bound=type[PretrainMethod])

#: Values of `model.encoder`.
CNN: tuple[str, ...] = ("resnet29",)
VIT: tuple[str, ...] = ("vit_tiny", "vit_small", "vit_base")
ALL: tuple[str, ...] = CNN + VIT

_known: dict[str, MethodSpec] = {}
_PACKAGE = "rcmstr_fast.methods"


def register(
    *,
    paper: str,
    encoders: Iterable[str] = ALL,
    needs: Iterable[str] = (),
    labels: bool = False,
    accumulates: bool = True,
    tiny: dict[str, Any] | None = None,
) -> Callable[[M], M]:
    """Make a `PretrainMethod` known under the default of its `Config.name`; arguments as in `MethodSpec`.

    Raises:
        ValueError: the name is empty or another class has it.
    """

    def add(method: M) -> M:
        config = method.Config
        name = config().name
        before = _known.get(name)
        if not name or (before and before.method.__qualname__ != method.__qualname__):
            raise ValueError(f"{method.__name__}.Config.name must be a name of its own, got {name!r}")
        spec = MethodSpec(
            name, method, config, paper, tuple(encoders), tuple(needs), labels, accumulates, dict(tiny or {})
        )
        method.spec, config.encoders = spec, spec.encoders
        _known[name] = spec
        return method

    return add


def find(name: str) -> MethodSpec:
    """The method of a name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in _known and name.isidentifier() and importlib.util.find_spec(f"{_PACKAGE}.{name}"):
        importlib.import_module(f"{_PACKAGE}.{name}")
    if name not in _known:
        _look()
    if name not in _known:
        near = difflib.get_close_matches(name, _known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"method.name must be one of {', '.join(sorted(_known))}, got {name}{hint}")
    return _known[name]


def every_method() -> list[MethodSpec]:
    """All methods, by name."""
    _look()
    return [_known[name] for name in sorted(_known)]


def settings(name: str, **fields: Any) -> MethodConfig:
    """The configuration of a method by name, with some fields changed."""
    return find(name).config(**fields)


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


def _look() -> None:
    """Import every module of the package."""
    package = importlib.import_module(_PACKAGE)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg:
            importlib.import_module(f"{_PACKAGE}.{module.name}")
