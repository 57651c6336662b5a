"""Pretraining: the loop. One step is: views -> method -> backward -> average -> update -> enqueue."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast import ops
from rcmstr_fast.config import PretrainConfig, RunError, resolve
from rcmstr_fast.methods import Batch, PretrainMethod, build_method, to_pixels
from rcmstr_fast.methods.base import PICTURES
from rcmstr_fast.models import placed
from rcmstr_fast.train.advice import Setting, warnings
from rcmstr_fast.train.captured import CapturedStep, GraphRecorder
from rcmstr_fast.train.distributed import World, joined
from rcmstr_fast.train.guard import Guard
from rcmstr_fast.train.identity import same_everywhere
from rcmstr_fast.train.log import Meter, RunLog
from rcmstr_fast.train.online_probe import OnlineProbe, open_probe_words
from rcmstr_fast.train.optim import build_optimizer, learning_rate
from rcmstr_fast.train.pictures import write_sheet
from rcmstr_fast.train.plan import Plan, make_plan
from rcmstr_fast.train.runfolder import RunFolder
from rcmstr_fast.train.signals import StopSignals
from rcmstr_fast.train.start import check_start, start_from
from rcmstr_fast.train.state import RunState
from rcmstr_fast.train.step import Step
from rcmstr_fast.train.stream import Stream
from rcmstr_fast.train.switches import decide
from rcmstr_fast.train.trackers import check_trackers
from rcmstr_fast.train.trial import Feed, Trial
from rcmstr_fast.train.tuned import adopted
from rcmstr_fast.train.utilisation import images_per_s_at_peak

#: Elements of a buffer that is too large to be looked at in every step of a CPU: the rows of a queue.
_LARGE = 2**18

_log = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig,
    *,
    build: Callable[[PretrainConfig, World], PretrainMethod] = build_method,
    open_stream: Callable[[PretrainConfig], Stream] = Stream,
) -> Path:
    """Pretrain in a run folder; an existing run with the same configuration is continued exactly.

    Args:
        config: null fields are filled in.
        build: makes the method.
        open_stream: opens the data.
    Returns:
        The run folder.
    Raises:
        ConfigError: the configuration, the data or the folder do not fit.
        RunError: the run could not go on, or a signal ended it (status 128 + signal); its state is saved.
    """
    resolve(config)
    check_trackers(config.train.trackers)
    check_start(config)
    folder = RunFolder(config.run)
    stopped = 0
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        world = stack.enter_context(joined(config.train.device, config.train.timeout_minutes))
        decide(config.train, world)  # a switch that cannot be is refused before anything is written
        config = world.on_rank0(lambda: folder.adopt(config))
        stream, probe_words = open_stream(config), open_probe_words(config)
        plan = make_plan(config, stream.epoch_size, world.world_size)
        world.on_rank0(lambda: stack.enter_context(folder.locked()))
        log = stack.enter_context(contextlib.closing(RunLog(folder, world)))
        stack.enter_context(numerics(config))
        held = world.on_rank0(folder.computed_with)
        trial = partial(trial_of, config, plan, world, folder, build, stream)
        found = stack.enter_context(adopted(config, plan, world, held, trial))
        trainer = Trainer(config, plan, world, folder, start_from(build(config, world), config), stream)
        if probe_words is not None and world.rank == 0:
            trainer.probe = OnlineProbe(probe_words, trainer.method, config.seed, world.device)
        trainer.step = trainer.state.restore(same_everywhere(stream.fingerprint, world))
        # What can be refused has been: only now is anything written.
        world.on_rank0(lambda: folder.write_description(config, world.world_size, found.kept()))
        log.open()
        for line in warnings(Setting(config, plan, stream.images, world.world_size)):
            _log.warning("%s", line)
        if trainer.step < plan.total_steps:
            stopped = trainer.run(log, signals)
        else:
            trainer.guard.check(last=True)
            _log.info("%s is finished at step %d; raise train.steps or train.epochs to go on", config.run, trainer.step)
    if stopped:  # only now: the processes have left the run together
        name = Signals(stopped).name
        raise RunError(f"stopped by {name}, saved at step {trainer.step}; the same command continues", 128 + stopped)
    return folder.path


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


def trial_of(
    config: PretrainConfig,
    plan: Plan,
    world: World,
    folder: RunFolder,
    build: Callable[[PretrainConfig, World], PretrainMethod],
    stream: Stream,
) -> Trial:
    """What the candidates of choices are timed on: trainers that are forgotten, in this process alone."""
    alone = World(world.device)

    def stepper() -> OneStep:
        return OneStep(Trainer(config, plan, alone, folder, build(config, alone), stream))

    return Trial(
        Feed(
            config,
            world.device,
            stepper,
            lambda step: step.trainer.method,
            lambda: stream.batches(0, plan, alone),
            world.world_size,
        )
    )


class OneStep:
    """A trainer's next step as a call; the trainer stays at step 0.

    Args:
        trainer: takes the steps.
    """

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer, self._signals = trainer, StopSignals()

    def __call__(self, batches: list[Batch]) -> None:
        """Take it; does not wait for the device."""
        self.trainer._train_step(batches, self._signals, False, False)
        self.trainer.step = 0


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
        self.images_per_s_at_peak = images_per_s_at_peak(config, world.device, self.bf16)
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
        alone = ops.each_operation(original, seed=self.config.seed, epoch=int(batch.epoch), index=index)
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
