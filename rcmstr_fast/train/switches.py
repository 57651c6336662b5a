"""The switches `train.cuda_graph` and `train.compile`: what `auto` means where, and what cannot be had."""

from dataclasses import dataclass

from rcmstr_fast.config import ConfigError, TrainConfig
from rcmstr_fast.train.distributed import World

#: What `auto` takes on a device. A whole-step graph removes every launch from the host's time, so it is taken where it
#: exists; torch.compile is left out until `rcmstr bench step` has shown it faster than the kernels it would replace.
AUTO: dict[str, dict[str, bool]] = {
    "cuda_graph": {"cpu": False, "cuda": True},
    "compile": {"cpu": False, "cuda": False},
}


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
    if train.cuda_graph == "on" and world.world_size > 1:
        raise ConfigError(
            f"train.cuda_graph=on needs a single process (gradients are exchanged outside of graphs), "
            f"got {world.world_size}; use auto or off"
        )
    if train.compile == "on" and train.checkpoint_activations:
        raise ConfigError("train.compile=on cannot be combined with train.checkpoint_activations=true; turn one off")
    graph = _chosen("cuda_graph", train.cuda_graph, world) and world.world_size == 1
    return Switches(graph, _chosen("compile", train.compile, world) and not train.checkpoint_activations)


def _chosen(name: str, value: str, world: World) -> bool:
    return AUTO[name].get(world.device.type, False) if value == "auto" else value == "on"
