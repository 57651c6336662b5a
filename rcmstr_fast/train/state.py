"""What of a run outlives its processes: when a checkpoint is due, what is in it, and how it is taken up again.

A save copies the state to host memory and lets a thread write it while training goes on; it changes nothing that
training reads, so the moments at which a run is saved have no influence on its result.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.config import ConfigError, PretrainConfig, RunError
from rcmstr_fast.methods.protocol import PretrainMethod
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.distributed import World, use_bf16
from rcmstr_fast.train.export import export_encoder
from rcmstr_fast.train.guard import Guard
from rcmstr_fast.train.identity import check_owner, facts, what_changed
from rcmstr_fast.train.log import Meter
from rcmstr_fast.train.plan import Plan
from rcmstr_fast.train.runfolder import RunFolder

#: What each optimiser keeps for a parameter.
_AVERAGES = {
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "SGD": {"momentum_buffer"},
    "Adadelta": {"square_avg", "acc_delta"},
}

_log = logging.getLogger(__name__)


class RunState:
    """Saves and restores a run.

    Args:
        config: resolved.
        plan: lengths of the run.
        world: this process.
        folder: where the run is kept.
        method: what is trained.
        optimizer: its optimiser.
        guard: the counts of non-finite steps.
        meter: the open logging window.

    Attributes:
        precision: in which the run computes: fp32, bf16 or fp64.
    """

    def __init__(
        self,
        config: PretrainConfig,
        plan: Plan,
        world: World,
        folder: RunFolder,
        method: PretrainMethod,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        meter: Meter,
    ) -> None:
        self.config, self.plan, self.world, self.folder = config, plan, world, folder
        self.method, self.optimizer, self.guard, self.meter = method, optimizer, guard, meter
        self.best_loss = self.window_loss = math.inf
        self._statistics = {
            name: x for name, x in method.named_buffers() if name.endswith(("running_mean", "running_var"))
        }
        bf16 = use_bf16(config.train.precision, world.device)
        self.precision = "bf16" if bf16 else "fp64" if config.train.precision == "fp64" else "fp32"
        self._data: str | None = None
        self._saved = time.monotonic()
        self._writer = checkpoint.Writer()

    def due(self) -> bool:
        """Whether the wall clock of rank 0 asks for a checkpoint."""
        minutes = self.config.train.save_minutes
        return self.world.rank == 0 and 0 < minutes * 60 <= time.monotonic() - self._saved

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While entered, checkpoints may be under way; at the end the last one is on the disk."""
        with self._writer:
            yield

    def check(self) -> None:
        """Raise the RunError of a checkpoint that could not be written."""
        self._writer.check()

    def save(self, step: int) -> None:
        """Begin to write last.pt, the encoder, and at a planned step best.pt where the last logging window is the best.

        Every process must call it. best.pt looks at planned steps after warm-up only: it does not depend on the clock.

        Args:
            step: steps done.
        Raises:
            RunError: the checkpoint before this one could not be written.
        """
        method = self.method.state_dict()  # sharded queues gather
        statistics = self._gathered_statistics()
        meter = self.meter.state_dict(self.world)
        self._saved = time.monotonic()
        if self.world.rank != 0:
            return
        method = on_host(method) | self._mean_statistics(statistics)
        config = dataclasses.asdict(self.config)
        planned = step == self.plan.total_steps or step % self.plan.save_every == 0
        best = None
        if planned and step > self.plan.warmup_steps and self.window_loss < self.best_loss:
            self.best_loss = self.window_loss
            best = {"step": step, "loss": self.best_loss, "config": config, "method": method}
        state = {
            "step": step, "epoch": self.plan.epoch(step), "samples": step * self.plan.global_batch,
            "epoch_size": self.plan.epoch_size, "world_size": self.world.world_size,
            "micro_batch": self.plan.micro_batch, "config": config, "method": method, "statistics": statistics.cpu(),
            "optimizer": on_host(self.optimizer.state_dict()), "guard": self.guard.state(), "meter": meter,
            "best_loss": self.best_loss, "window_loss": self.window_loss, "rng": rng_state(self.world.device),
            "data": self._data, "facts": self._facts(),
        }  # fmt: skip

        def write() -> None:
            if best is not None:
                checkpoint.save(self.folder.best, best)
            checkpoint.save(self.folder.last, state, keep_previous=True)
            export_encoder(self.method, self.folder.encoder, self.config, step, self._exported(method))
            _log.info("saved %s at step %d", self.folder.last, step)

        self._writer.start(write)

    def restore(self, data: str | None = None) -> int:
        """Take up the newest whole checkpoint, if there is one; returns the steps done.

        Args:
            data: fingerprint of the data of this run; None: unknown.
        Raises:
            ConfigError: it is not readable or not this run's, or the data have changed since.
        """
        self._data = data
        path = self.world.on_rank0(lambda: checkpoint.newest(self.folder.checkpoints))
        if path is None:
            return 0
        state = checkpoint.load(path)
        try:
            self._compare_data(state["epoch_size"])
            check_owner(path, state, self.config, data)
            return self._take_up(state)
        except (ConfigError, RunError):
            raise
        except Exception as error:  # loaders over values of any kind and shape
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{path}: expected a checkpoint of this run, its parts do not fit ({reason})") from error

    def _compare_data(self, epoch_size: int) -> None:
        if epoch_size != self.plan.epoch_size:
            raise ConfigError(
                f"data.roots: the run began with {epoch_size} images an epoch, now there are "
                f"{self.plan.epoch_size}; set data.epoch_size or restore the data"
            )

    def _take_up(self, state: dict[str, Any]) -> int:
        """Continue from the values of a checkpoint."""
        step = int(state["step"])
        if not 0 <= step < 2**63:
            raise ValueError(f"step {step}")
        self.method.load_state_dict(state["method"])
        if len(state["statistics"]) == self.world.world_size:
            self._load_statistics(state["statistics"][self.world.rank])
        load_optimizer(self.optimizer, state["optimizer"])
        self.guard.load_state(state["guard"])
        self.meter.load_state_dict(state["meter"], self.world)
        self.best_loss, self.window_loss = float(state["best_loss"]), float(state["window_loss"])
        set_rng_state(state["rng"], self.world.device)
        if self.world.rank == 0:
            self._compare_divisions(int(state["world_size"]), int(state["micro_batch"]))
            line = what_changed(state.get("facts"), self._facts(), cosine=self.config.optim.schedule != "constant")
            if line:
                _log.warning("%s", line)
        return step

    def _facts(self) -> dict[str, str]:
        return facts(self.precision, self.plan.total_steps, self.world.device)

    def _compare_divisions(self, world_size: int, micro_batch: int) -> None:
        """Say where another division of the batch changes the mathematics."""
        if world_size != self.world.world_size:
            _log.info("the run had %d processes and goes on with %d", world_size, self.world.world_size)
        if micro_batch != self.plan.micro_batch and self.config.method.bn_group_size == 0:
            _log.warning(
                "batch norm takes its statistics over %d images from now on, %d before (method.bn_group_size=0: the "
                "images of a forward pass); the samples are the same, the losses not quite",
                self.plan.micro_batch,
                micro_batch,
            )

    def _exported(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The exported tensors out of the method's state."""
        tensors: dict[str, Tensor] = {}
        for part, module in self.method.exported().items():
            prefix = next(f"{name}." for name, found in self.method.named_modules() if found is module)
            tensors |= {f"{part}.{key[len(prefix) :]}": x for key, x in state.items() if key.startswith(prefix)}
        return tensors

    def _gathered_statistics(self) -> Tensor:
        """Running statistics of every process, [W, n]: each process goes on with its own."""
        if not self._statistics:
            return torch.empty(self.world.world_size, 0)
        return self.world.gather(torch.cat([x.flatten() for x in self._statistics.values()])[None])

    def _mean_statistics(self, gathered: Tensor) -> dict[str, Tensor]:
        """Their means, by the names of the method's state."""
        parts = gathered.mean(0).cpu().split([x.numel() for x in self._statistics.values()])
        return {name: part.view(x.shape) for (name, x), part in zip(self._statistics.items(), parts, strict=True)}

    @torch.no_grad()
    def _load_statistics(self, row: Tensor) -> None:
        parts = row.split([x.numel() for x in self._statistics.values()])
        for x, part in zip(self._statistics.values(), parts, strict=True):
            x.copy_(part.view(x.shape))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up the averages of an optimiser; its settings stay those of the configuration.

    Raises:
        ValueError: the averages are not those of its parameters.
    """
    own = [{name: x for name, x in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        held = group["params"]
        group.clear()
        group.update({"params": held, **settings})
    for parameter, averages in optimizer.state.items():
        if averages and averages.keys() != _AVERAGES[type(optimizer).__name__]:
            raise ValueError(f"averages {', '.join(map(str, averages))} of the optimiser")
        for name, x in averages.items():
            if not isinstance(x, Tensor) or x.shape not in (parameter.shape, ()) or not x.is_floating_point():
                raise ValueError(f"{name} of the optimiser")


def on_host(tree: Any) -> Any:
    """A copy of nested dictionaries and lists with every tensor copied to host memory."""
    if isinstance(tree, dict):
        return {name: on_host(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(on_host(value) for value in tree)
    return tree.detach().to("cpu", copy=True) if isinstance(tree, Tensor) else tree


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of torch's generators of this process."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put torch's generators back."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
