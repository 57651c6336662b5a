"""Pretraining: the loop. One step is: views -> method -> backward -> average -> update -> enqueue."""

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor, nn

from rcmstr_fast import ops
from rcmstr_fast.config import ConfigError, PretrainConfig, RunError, resolve
from rcmstr_fast.methods import StepBatch, build_method
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.distributed import World, joined, use_bf16
from rcmstr_fast.train.export import export_encoder
from rcmstr_fast.train.guard import Guard, running_statistics
from rcmstr_fast.train.log import Meter, RunLog
from rcmstr_fast.train.optim import apply_gradients, build_optimizer, learning_rate
from rcmstr_fast.train.pictures import write_sheet
from rcmstr_fast.train.plan import Plan, make_plan
from rcmstr_fast.train.runfolder import RunFolder
from rcmstr_fast.train.signals import StopSignals
from rcmstr_fast.train.stream import Stream, TrainBatch

PICTURES = 8

_log = logging.getLogger(__name__)


def pretrain(
    config: PretrainConfig,
    *,
    build: Callable[[PretrainConfig, World], nn.Module] = build_method,
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
    folder = RunFolder(config.run)
    stopped = 0
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        world = stack.enter_context(joined(config.train.device))
        config = world.on_rank0(lambda: folder.adopt(config))
        stream = open_stream(config)
        plan = make_plan(config, stream.epoch_size, world.world_size)
        world.on_rank0(lambda: folder.claim(stack, config, world.world_size))
        log = stack.enter_context(contextlib.closing(RunLog(folder, world)))
        stack.enter_context(numerics(config))
        trainer = Trainer(config, plan, world, folder, build(config, world), stream)
        trainer.restore()
        if trainer.step < plan.total_steps:
            stopped = trainer.run(log, signals)
        else:
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
        self, config: PretrainConfig, plan: Plan, world: World, folder: RunFolder, method: nn.Module, stream: Stream
    ) -> None:
        self.config, self.plan, self.world, self.folder, self.stream = config, plan, world, folder, stream
        self.method = method.to(world.device, memory_format=torch.channels_last).train()
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.method, config.optim)
        self.guard = Guard(self.method, config.train.max_nonfinite, world)
        self.meter = Meter()
        self.step = 0
        self.best_loss = self.window_loss = math.inf
        self.bf16 = use_bf16(config.train.precision, world.device)
        self._stop = torch.zeros((), device=world.device)

    def run(self, log: RunLog, signals: StopSignals) -> int:
        """Train to the end of the plan (0 is returned), or until a signal comes (its number)."""
        self._announce()
        log.begin(self.step, self.plan.total_steps)
        try:
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
            looked = step % self.guard.interval == 0 or step == total
            if looked:
                self.guard.check()
            if logged:
                self._log(log, monitors)
            stopping = self._stopping(signals) if looked else False
            if stopping or step == total or step % self.plan.save_every == 0:
                self.save()
            if step == total:
                _log.info("finished at step %d", step)
                return 0
            if stopping:
                number = signals.received or int(Signals.SIGTERM)
                _log.info("stopped by %s at step %d", Signals(number).name, step)
                return number
        raise RunError("the data ended before the run")

    def _train_step(
        self, batches: list[TrainBatch], signals: StopSignals, monitor: bool, drawn: bool
    ) -> dict[str, Tensor]:
        """One optimiser step over the micro-batches of this process; returns the monitors."""
        parts = len(batches)
        terms: dict[str, Tensor] = {}
        monitors: dict[str, Tensor] = {}
        self.guard.begin_step()
        self.method.begin_step()
        self.optimizer.zero_grad()
        for batch in batches:
            drawing = drawn and batch is batches[0] and self.world.rank == 0
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16):
                micro = StepBatch(batch.views, batch.index, batch.epoch, batch.permuted)
                output = self.method(micro, monitor=monitor, pictures=drawing)
            (output.loss / parts).backward()
            for sums, new in ((terms, {"loss": output.loss, **output.terms}), (monitors, output.monitors)):
                for name, value in new.items():
                    sums[name] = sums.get(name, 0.0) + value.detach().float() / parts
            if drawing:
                self._draw(batch, output.pictures)
        stop = torch.full_like(terms["loss"], float(signals.received != 0))
        loss, stop = self.world.average_gradients(self.parameters, torch.stack([terms["loss"], stop]))
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        lr = learning_rate(self.step, self.config.optim, self.plan)
        apply_gradients(self.optimizer, lr, norm, finite, self.config.optim.clip)
        self.method.end_step()
        self.guard.end_step(self.step + 1, finite, terms)
        self.meter.add({**terms, "grad_norm": norm}, finite)
        self._stop += stop
        return monitors

    def _stopping(self, signals: StopSignals) -> bool:
        """Whether a signal came; with several processes, to any of them, at a step they all agree on."""
        return bool(signals.received) if self.world.world_size == 1 else float(self._stop) > 0

    def _log(self, log: RunLog, monitors: dict[str, Tensor]) -> None:
        """Read the window's means (waits for the device) and write a metrics line."""
        means = self.meter.read(self.world)
        watched = self.world.mean(torch.stack(list(monitors.values()))).tolist() if monitors else []
        if means["loss"] is not None:
            self.window_loss = means["loss"]
        speed = log.speed(self.step, self.plan.global_batch, self.stream.waited)
        log.write({
            "step": self.step,
            "epoch": self.step / self.plan.steps_per_epoch,
            "samples": self.step * self.plan.global_batch,
            **means,
            **dict(zip(monitors, watched, strict=True)),
            "lr": learning_rate(self.step - 1, self.config.optim, self.plan),
            "nonfinite": int(self.guard.total),
            **speed,
            "broken": self.stream.broken,
        })  # fmt: skip

    def _draw(self, batch: TrainBatch, pictures: dict[str, Tensor]) -> None:
        query, key = (view[:PICTURES].float() * 0.5 + 0.5 for view in batch.views)
        original = batch.images[:PICTURES]
        alone = ops.each_operation(
            original, seed=self.config.seed, epoch=batch.epoch, index=batch.index[:PICTURES].cpu()
        )
        columns = {name: picture * 0.5 + 0.5 for name, picture in alone.items()}
        write_sheet(self.folder.pictures, {"original": original, **columns, "query": query, "key": key, **pictures})

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.parameters)
        _log.info(
            "%s %s: %d images an epoch, %d steps an epoch, %d steps, batch %d = %d processes x %d x %d, %.1f M "
            "parameters, %s, %s; begins at step %d",
            self.config.method.name, self.config.model.encoder, self.plan.epoch_size, self.plan.steps_per_epoch,
            self.plan.total_steps, self.plan.global_batch, self.world.world_size, self.config.train.accumulate,
            self.plan.micro_batch, parameters / 1e6, self.world.device, "bf16" if self.bf16 else "fp32", self.step,
        )  # fmt: skip

    def save(self) -> None:
        """Write last.pt, best.pt where the last logging window is the best after warm-up, and the encoder."""
        self.world.average_(running_statistics(self.method))
        meter = self.meter.state_dict(self.world)
        if self.world.rank != 0:
            return
        config = dataclasses.asdict(self.config)
        method = self.method.state_dict()
        if self.step > self.plan.warmup_steps and self.window_loss < self.best_loss:
            self.best_loss = self.window_loss
            best = {"step": self.step, "loss": self.best_loss, "config": config, "method": method}
            checkpoint.save(self.folder.best, best)
        state = {
            "step": self.step, "epoch": self.plan.epoch(self.step), "samples": self.step * self.plan.global_batch,
            "epoch_size": self.plan.epoch_size, "world_size": self.world.world_size, "config": config,
            "method": method, "optimizer": self.optimizer.state_dict(), "guard": self.guard.state(), "meter": meter,
            "best_loss": self.best_loss, "window_loss": self.window_loss, "rng": rng_state(self.world.device),
        }  # fmt: skip
        checkpoint.save(self.folder.last, state, keep_previous=True)
        export_encoder(self.method, self.folder.encoder, self.config, self.step)
        _log.info("saved %s at step %d", self.folder.last, self.step)

    def restore(self) -> None:
        """Take up the newest whole checkpoint, if there is one.

        Raises:
            ConfigError: it is not readable, or the data have changed since.
        """
        path = self.world.on_rank0(lambda: checkpoint.newest(self.folder.checkpoints))
        if path is None:
            return
        state = checkpoint.load(path)
        if state["epoch_size"] != self.plan.epoch_size:
            raise ConfigError(
                f"data.roots: the run began with {state['epoch_size']} images an epoch, now there are "
                f"{self.plan.epoch_size}; set data.epoch_size or restore the data"
            )
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state(state["guard"])
        self.meter.load_state_dict(state["meter"], self.world.device)
        self.step, self.best_loss, self.window_loss = state["step"], state["best_loss"], state["window_loss"]
        set_rng_state(state["rng"], self.world.device)


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of torch's generators of this process."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put torch's generators back."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
