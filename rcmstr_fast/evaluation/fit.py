"""Training of what stands over an encoder, in one process or many, with checkpoints."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rcmstr_fast.config import ConfigError, RunError
from rcmstr_fast.evaluation.config import TrainedConfig
from rcmstr_fast.evaluation.decoder_data import Feed, ahead
from rcmstr_fast.evaluation.over_encoder import OverEncoder
from rcmstr_fast.evaluation.schedule import Micro, Order, Schedule, build_optimizer, learning_rate
from rcmstr_fast.models.batch_norm import HeldStatistics, norms_of
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.gradients import GradientAverage
from rcmstr_fast.train.log import Meter, RunLog
from rcmstr_fast.train.optim import apply_gradients
from rcmstr_fast.train.runfolder import RunFolder
from rcmstr_fast.train.signals import StopSignals

#: Validates the network as it is, in every process: name -> value; the first two decide which validation is the best.
Validate = Callable[[], dict[str, float]]


class Fit:
    """One training run.

    A step is the same whatever its division: every word has the same weight in the loss of the whole batch, so the
    gradients of processes and micro-batches add up to those of one pass over it.

    Attributes:
        step: steps done.
        lr: learning rate of the last step.
        best: step and figures of the best validation so far, and its state is in `best.pt`; None before.
    """

    def __init__(
        self,
        recogniser: OverEncoder,
        config: TrainedConfig,
        schedule: Schedule,
        order: Order,
        world: World,
        folder: RunFolder,
        identity: str,
    ) -> None:
        """Prepare the optimiser.

        Args:
            recogniser: on its device.
            config: checked.
            schedule: lengths of the run.
            order: of the words.
            world: this process.
            folder: where checkpoints go.
            identity: digest of what the run starts from; a checkpoint of another one is refused.
        """
        self.recogniser, self.config, self.schedule, self.order = recogniser, config, schedule, order
        self.world, self.folder, self.identity = world, folder, identity
        self.parameters: list[Tensor] = [p for p in recogniser.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(recogniser, config)
        self.gradients = GradientAverage(self.parameters, world)
        self.statistics = HeldStatistics(norms_of(recogniser))
        self.meter = Meter()
        self.step = 0
        self.lr = config.resolved_lr
        self.best: dict[str, float] | None = None
        self._running = [x for name, x in recogniser.named_buffers() if name.endswith(("running_mean", "running_var"))]
        self._look = 1 if world.device.type == "cpu" else 10  # steps between looks at what the processes ask for
        self._stopping = torch.zeros((), device=world.device)
        dtype = torch.float64 if recogniser.precision == "fp64" else torch.float32
        self._parts = [
            torch.zeros(2, device=world.device, dtype=dtype)
        ]  # loss and weight of the micro-batches of a step

    def restore(self) -> None:
        """Continue from the newest checkpoint of the folder, if there is one.

        Raises:
            ConfigError: it is damaged, or of a run with another start.
        """
        path = self.world.on_rank0(lambda: checkpoint.newest(self.folder.checkpoints))
        if path is None:
            return
        state = checkpoint.load(path)
        if state.get("identity") != self.identity:
            raise ConfigError(
                f"run: {self.folder.path} was started with another encoder or other words than those found now; "
                "name another folder"
            )
        self.recogniser.load_changes(state["recogniser"])
        if len(state["statistics"]) == self.world.world_size:
            self._set_running(state["statistics"][self.world.rank])
        self.optimizer.load_state_dict(state["optimizer"])
        self.meter.load_state_dict(state["meter"], self.world)
        self.step, self.best = state["step"], state["best"]
        if len(state["rng"]["cpu"]) == self.world.world_size:
            self._set_rng({name: rows[self.world.rank] for name, rows in state["rng"].items()})
        else:  # another number of processes: new streams, still a function of seed and step
            torch.manual_seed(self.config.seed + self.world.rank + 7919 * self.step)

    def save(self) -> None:
        """Write `last.pt`; every process must call it."""
        statistics = self.world.gather(self._flat_running()[None])
        meter = self.meter.state_dict(self.world)
        rng = {"cpu": self.world.gather(torch.get_rng_state()[None].to(self.world.device)).cpu()}
        if self.world.device.type == "cuda":
            own = torch.cuda.get_rng_state(self.world.device)[None].to(self.world.device)
            rng["cuda"] = self.world.gather(own).cpu()
        if self.world.rank != 0:
            return
        state: dict[str, Any] = {
            "identity": self.identity,
            "step": self.step,
            "best": self.best,
            "recogniser": self.recogniser.changes(),
            "statistics": statistics.cpu(),
            "optimizer": self.optimizer.state_dict(),
            "meter": meter,
            "rng": rng,
        }
        checkpoint.save(self.folder.last, state, keep_previous=True)

    def load_best(self) -> None:
        """Give the recogniser the weights of the best validation."""
        path = self.world.on_rank0(lambda: self.folder.best)
        self.recogniser.load_changes(checkpoint.load(path)["recogniser"])

    def run(self, train: Feed, validate: Validate, log: RunLog) -> None:
        """Train to the last step; the best validation is in `best.pt` then.

        Raises:
            RunError: a signal (after a checkpoint), or no step of a logging window had a finite loss.
            ConfigError: no picture of a batch could be decoded.
        """
        waited, total = 0.0, self.schedule.total_steps
        log.begin(self.step, total)
        micros = self.order.micros(
            self.step, self.config.accumulate, self.world.rank, self.world.world_size, train.kept
        )
        with StopSignals() as signals:
            batches = ahead(lambda micro: train.load(micro.positions), micros)
            while True:
                began = time.monotonic()
                micro, loaded = next(batches, (None, None))
                waited += time.monotonic() - began
                if micro is None:
                    break
                self._pass(train, micro, loaded)
                if not micro.last:
                    continue
                self._update(train, signals.received)
                log.advance()
                if self.step % self.config.log_every == 0 or self.step == total:
                    self._log_line(log, waited)
                if self.step % self.schedule.eval_every == 0 or self.step == total:
                    self._validate(validate, log)
                    self.save()
                number = self._stop(signals.received)
                if number:
                    self.save()
                    raise RunError(f"stopped by signal {number} at step {self.step}, saved", status=128 + number)

    def _stop(self, received: int) -> int:
        """The signal that ends the run, at a step that all processes agree on; 0: none."""
        if self.world.world_size == 1:
            return int(received)
        if self.step % self._look or not float(self._stopping):
            return 0
        return int(received) or 15

    def _pass(self, train: Feed, micro: Micro, loaded: np.ndarray | None) -> None:
        """Forward and backward of a micro-batch; its loss and its share of the batch are noted."""
        if len(self._parts) == 1:
            self.optimizer.zero_grad(set_to_none=True)
        self.recogniser.train()
        if micro.last:
            self.gradients.begin_last()
        if not len(micro.positions):  # kept frames: none of these words is this process's
            self._nothing()
            return
        with self.statistics.held():
            frames = train.frames(micro.positions, loaded, micro.epoch, micro.slots)
            good = [i for i, position in enumerate(micro.positions.tolist()) if position not in train.images.broken]
            chosen = good or list(range(len(frames)))
            targets = train.targets(micro.positions, loaded, micro.epoch, micro.slots, chosen)
            loss = self.recogniser.loss(frames if len(chosen) == len(frames) else frames[chosen], targets)
        whole = train.terms(micro.batch)
        share = self.recogniser.loss_terms(targets) / whole * self.world.world_size if good else 0.0
        (loss * share).backward()
        self._parts.append(torch.stack([loss.detach() * share, loss.new_tensor(share)]))

    def _nothing(self) -> None:
        """Gradients of zero, so that every process has the same ones to average."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _update(self, train: Feed, received: int) -> None:
        """Average the gradients over the processes and change the weights, unless something is not finite."""
        own = torch.stack(self._parts).sum(0)
        del self._parts[1:]
        loss, weight, stop = self.gradients.finish(torch.cat([own, own.new_tensor([float(bool(received))])]))
        self._stopping = self._stopping + stop
        if train.images.broken and not float(weight):
            raise ConfigError(f"train: none of the {self.schedule.batch_size} pictures of a batch could be decoded")
        found = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_div_(found, weight.clamp_min(1e-12))  # 1 but for rounding, unless pictures are broken
        norm = torch.nn.utils.get_total_norm(found)
        loss = loss / weight
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        self.lr = learning_rate(self.step, self.config, self.schedule)
        apply_gradients(self.optimizer, self.lr, norm, finite, self.config.clip)
        self.statistics.move(finite)
        self.meter.add({"loss": loss, "grad_norm": norm}, finite)
        self.step += 1

    def _log_line(self, log: RunLog, waited: float) -> None:
        means = self.meter.read(self.world)
        if means["loss"] is None:
            raise RunError(f"step {self.step}: no finite loss since the last line; lower lr, or use precision=fp32")
        speed = log.speed(self.step, self.schedule.batch_size, waited)
        log.write({"step": self.step, **means, "lr": self.lr, **speed})

    def _validate(self, validate: Validate, log: RunLog) -> None:
        if self.world.world_size > 1 and self._running:
            self._set_running(self.world.mean(self._flat_running()))
        found = validate()
        log.write({"step": self.step, **{f"val_{name}": value for name, value in found.items()}})
        first, second = list(found)[:2]
        if self.best is None or (found[first], found[second]) > (self.best[first], self.best[second]):
            self.best = {"step": self.step, first: found[first], second: found[second]}
            if self.world.rank == 0:
                checkpoint.save(self.folder.best, {"recogniser": self.recogniser.changes(), "step": self.step})

    def _flat_running(self) -> Tensor:
        """All running statistics one after the other; each process has its own between validations."""
        empty = torch.zeros(0, device=self.world.device)
        return torch.cat([empty, *(x.flatten() for x in self._running)])

    @torch.no_grad()
    def _set_running(self, flat: Tensor) -> None:
        for x, part in zip(self._running, flat.split([x.numel() for x in self._running]), strict=True):
            x.copy_(part.view(x.shape))

    def _set_rng(self, own: dict[str, Tensor]) -> None:
        torch.set_rng_state(own["cpu"].clone())  # torch reads from the start of the storage, whatever the view
        if self.world.device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"].clone(), self.world.device)
