"""The switches `train.cuda_graph` and `train.compile`: what `auto` means where, and what cannot be had."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rcmstr_fast.config import ConfigError, TrainConfig
from rcmstr_fast.train.distributed import World
from rcmstr_fast.tuning import choices
from rcmstr_fast.tuning.choices import Choice, Setting, Value

#: What `auto` takes on a GPU before a run has measured it. A whole-step graph removes every launch from the host's time.
#: With several processes a step is several graphs, which no GPUs have run yet: they have to be asked for (`on`).
#: What torch.compile could fuse of a step is fused in the operations already, and compiling takes minutes.
PRIOR: dict[str, bool] = {"cuda_graph": True, "compile": False}


def _ordered(name: str) -> Callable[[Setting], str]:
    def ordered(setting: Setting) -> str:
        value = getattr(setting.config.train, name)
        return "" if value == "auto" else f"train.{name}={value}"

    return ordered


def _on_gpu(setting: Setting, possible: bool, prior: bool) -> list[Value]:
    return [prior, not prior] if setting.device == "cuda" and possible else []


def _on_off(value: Value) -> str:
    return "on" if value else "off"


choices.declare(
    Choice(
        "train.cuda_graph",
        "the whole step as one CUDA graph",
        "built_step",
        1.2,
        lambda setting: _on_gpu(setting, setting.processes == 1, PRIOR["cuda_graph"]),
        lambda setting: PRIOR["cuda_graph"],
        _ordered("cuda_graph"),
        _on_off,
    )
)
choices.declare(
    Choice(
        "train.compile",
        "torch.compile of the networks' dense passes",
        "built_step",
        1.01,
        lambda setting: _on_gpu(setting, not setting.config.train.checkpoint_activations, PRIOR["compile"]),
        lambda setting: PRIOR["compile"],
        _ordered("compile"),
        _on_off,
    )
)


def _threads(setting: Setting) -> list[Value]:
    return list(dict.fromkeys([setting.threads, setting.cpus, max(1, setting.cpus // 2)]))


def _set_threads(count: int) -> Callable[[], None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    return lambda: torch.set_num_threads(before)


choices.declare(
    Choice(
        "cpu.threads",
        "threads of a step",
        "step",
        1.15,
        lambda setting: _threads(setting) if setting.device == "cpu" and setting.processes == 1 else [],
        lambda setting: setting.threads,
        lambda setting: "OMP_NUM_THREADS" if "OMP_NUM_THREADS" in os.environ else "",
        apply=_set_threads,
    )
)


@dataclass(frozen=True)
class Switches:
    """How a run computes its steps.

    Attributes:
        cuda_graph: steps are recorded once and replayed.
        compile: the networks' dense forward passes go through torch.compile.
    """

    cuda_graph: bool
    compile: bool


def decide(train: TrainConfig, world: World) -> Switches:
    """The switches of a run on its device.

    Raises:
        ConfigError: a switch is `on` where it cannot be.
    """
    if train.cuda_graph == "on" and world.device.type != "cuda":
        raise ConfigError(f"train.cuda_graph=on needs a CUDA GPU, this run is on {world.device}; use auto or off")
    if train.compile == "on" and train.checkpoint_activations:
        raise ConfigError("train.compile=on cannot be combined with train.checkpoint_activations=true; turn one off")
    graph = _chosen("cuda_graph", train.cuda_graph, world) and (world.world_size == 1 or train.cuda_graph == "on")
    return Switches(graph, _chosen("compile", train.compile, world) and not train.checkpoint_activations)


def _chosen(name: str, value: str, world: World) -> bool:
    if value != "auto":
        return value == "on"
    measured = choices.value(f"train.{name}")
    return world.device.type == "cuda" and bool(PRIOR[name] if measured is None else measured)
