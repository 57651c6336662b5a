"""The state of a run and its step: views -> method -> backward -> average -> update -> enqueue."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.config import PretrainConfig, RunError
from rcmstr_fast.methods.protocol import PICTURES, Batch, PretrainMethod, to_pixels
from rcmstr_fast.models.placing import placed
from rcmstr_fast.ops.augment_views import each_operation
from rcmstr_fast.train.captured import CapturedStep, GraphRecorder
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.guard import Guard
from rcmstr_fast.train.log import Meter, RunLog
from rcmstr_fast.train.online_probe import OnlineProbe
from rcmstr_fast.train.optim import build_optimizer, learning_rate
from rcmstr_fast.train.pictures import write_sheet
from rcmstr_fast.train.plan import Plan
from rcmstr_fast.train.runfolder import RunFolder
from rcmstr_fast.train.signals import StopSignals
from rcmstr_fast.train.state import RunState
from rcmstr_fast.train.step import Step
from rcmstr_fast.train.stream import Stream
from rcmstr_fast.train.switches import decide

#: Elements of a buffer that is too large to be looked at in every step of a CPU: the rows of a queue.
_LARGE = 2**18

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def numerics(config: PretrainConfig) -> Iterator[None]:
    """Seed, full float32 convolutions, and (train.deterministic) deterministic algorithms while entered."""
    cudnn, exact = torch.backends.cudnn, config.train.deterministic
    before = cudnn.allow_tf32, cudnn.benchmark
    torch.manual_seed(config.seed)
    if exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        torch.use_deterministic_algorithms(True)
    cudnn.allow_tf32, cudnn.benchmark = False, not exact
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before
        if exact:
            torch.use_deterministic_algorithms(False)


def changed_by_updates(method: PretrainMethod) -> dict[str, Tensor]:
    """What updates change and the guard watches, by name: weights and buffers, but for the rows of queues."""
    weights = {name: x for name, x in method.named_parameters() if x.requires_grad}
    return weights | {name: x for name, x in method.named_buffers() if x.numel() < _LARGE}


class Trainer:
    """The state of a run and what a step does to it.

    Args:
        config: resolved.
        plan: its lengths.
        world: this process.
        folder: where the run is kept.
        method: what is trained.
        stream: the data.
    """

    def __init__(
        self,
        config: PretrainConfig,
        plan: Plan,
        world: World,
        folder: RunFolder,
        method: PretrainMethod,
        stream: Stream,
    ) -> None:
        self.config, self.plan, self.world, self.folder, self.stream = config, plan, world, folder, stream
        dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
        self.method = placed(method, world.device, dtype).train()
        self.optimizer = build_optimizer(self.method, config.optim)
        self.guard = Guard(config.train.max_nonfinite, world, changed_by_updates(self.method))
        self.meter = Meter()
        self.state = RunState(config, plan, world, folder, self.method, self.optimizer, self.guard, self.meter)
        self.take = Step(config, world, self.method, self.optimizer, self.guard, self.meter)
        self.bf16 = self.take.bf16
        self.switches = decide(config.train, world)
        if self.switches.compile:
            self.method.compile_networks()
        self.captured = CapturedStep(self.take, GraphRecorder(world.device)) if self.switches.cuda_graph else None
        self.images_per_s_at_peak: float | None = None
        self.probe: OnlineProbe | None = None
        self.step = 0
        self.observing: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def run(self, log: RunLog, signals: StopSignals) -> int:
        """Train to the end of the plan (0 is returned), or until a signal comes (its number)."""
        self._announce()
        log.begin(self.step, self.plan.total_steps, self.config.train.trackers, asdict(self.config))
        self.observing = log.observing
        try:
            with self.state.writing():
                return self._run(log, signals)
        except RunError as error:
            _log.error("%s", error, extra={"file_only": True})
            raise

    def _run(self, log: RunLog, signals: StopSignals) -> int:
        train, total = self.config.train, self.plan.total_steps
        for batches in self.stream.batches(self.step, self.plan, self.world):
            step = self.step + 1
            logged = step % train.log_every == 0 or step == total
            drawn = step in (1, total) or (train.picture_every > 0 and step % train.picture_every == 0)
            monitors = self._train_step(batches, signals, logged, drawn)
            self.step = step
            log.advance()
            planned = step == total or step % self.plan.save_every == 0
            looked = step % self.guard.interval == 0 or planned
            if looked:
                self.guard.check()
                self.state.check()
            if logged:
                self._log(log, monitors)
            if self.probe is not None and (step % train.probe_every == 0 or step == total):
                log.write({"step": step, **self.probe()})
            stopping, due = self._requests(signals) if looked else (False, False)
            if stopping or due or planned:
                self.state.save(step)
            if step == total:
                self.guard.check(last=True)
                _log.info("finished at step %d", step)
                return 0
            if stopping:
                number = signals.received or int(Signals.SIGTERM)
                _log.info("stopped by %s at step %d", Signals(number).name, step)
                return number
        raise RunError("the data ended before the run")

    def _train_step(self, batches: list[Batch], signals: StopSignals, monitor: bool, drawn: bool) -> dict[str, Tensor]:
        """One optimiser step over the micro-batches of this process; returns the monitors."""
        rate = learning_rate(self.step, self.config.optim, self.plan)
        if not 0 <= rate <= float(self.config.optim.lr or 0.0):
            raise RunError(
                f"step {self.step + 1}: the learning rate must be in [0, {self.config.optim.lr}], got {rate}"
            )
        requests = signals.received != 0, self.state.due()
        take, progress = self.take, self.step / self.plan.total_steps
        take.set(self.step + 1, int(batches[0].epoch), rate, requests, progress)
        micro = [replace(b, epoch=take.epoch, progress=take.progress, images=None) for b in batches]
        if self.captured is not None and not drawn:
            return self.captured(micro, monitor)[0]
        if self.captured is not None:
            self.captured.forget()  # a step outside of the recordings needs the memory that they hold
        drawing = drawn and self.world.rank == 0
        monitors, sheet = self.take(micro, monitor, drawing)
        if drawing:
            with self.observing("views.png"):
                self._draw(batches[0], sheet)
        return monitors

    def _requests(self, signals: StopSignals) -> tuple[bool, bool]:
        """Whether a signal came (to any process) and whether a checkpoint is due, at a step all processes agree on."""
        if self.world.world_size == 1:
            return bool(signals.received), self.state.due()
        stop, due = self.take.requested.tolist()
        self.take.requested.zero_()
        return stop > 0, due > 0

    def _log(self, log: RunLog, monitors: dict[str, Tensor]) -> None:
        """Read the window's means (waits for the device) and write a metrics line."""
        means = self.meter.read(self.world)
        watched = self.world.mean(torch.stack(list(monitors.values()))).tolist() if monitors else []
        if means["loss"] is not None:
            self.state.window_loss = means["loss"]
        speed = log.speed(self.step, self.plan.global_batch, self.stream.waited)
        if self.images_per_s_at_peak is not None:
            speed["mfu_percent"] = 100 * speed["images_per_s"] / self.world.world_size / self.images_per_s_at_peak
        log.write(
            {
                "step": self.step,
                "epoch": self.step / self.plan.steps_per_epoch,
                "samples": self.step * self.plan.global_batch,
                **means,
                **dict(zip(monitors, watched, strict=True)),
                "lr": learning_rate(self.step - 1, self.config.optim, self.plan),
                "nonfinite": int(self.guard.total),
                **speed,
                "broken": self.stream.broken,
            }
        )

    def _draw(self, batch: Batch, pictures: dict[str, Tensor]) -> None:
        assert batch.images is not None
        original, index = batch.images[:PICTURES], batch.index[:PICTURES].cpu()
        alone = each_operation(original, seed=self.config.seed, epoch=int(batch.epoch), index=index)
        columns = {name: picture * 0.5 + 0.5 for name, picture in alone.items()}
        views = {name: to_pixels(view) for name, view in batch.views.items()}
        write_sheet(self.folder.pictures, {"original": original, **columns, **views, **pictures})

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.take.parameters)
        _log.info(
            "%s %s: %d images an epoch, %d steps an epoch, %d steps, batch %d = %d processes x %d x %d, %.1f M "
            "parameters, %s, %s; begins at step %d",
            self.config.method.name,
            self.config.model.encoder,
            self.plan.epoch_size,
            self.plan.steps_per_epoch,
            self.plan.total_steps,
            self.plan.global_batch,
            self.world.world_size,
            self.config.train.accumulate,
            self.plan.micro_batch,
            parameters / 1e6,
            self.world.device,
            self.state.precision,
            self.step,
        )
        for remark in self.method.remarks():
            _log.info("%s", remark)


class OneStep:
    """A trainer's next step as a call; the trainer stays at step 0.

    Args:
        trainer: takes the steps.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self._signals = trainer, StopSignals()

    def __call__(self, batches: list[Batch]) -> None:
        """Take it; does not wait for the device."""
        self.trainer._train_step(batches, self._signals, False, False)
        self.trainer.step = 0
