"""Training of a recogniser on labelled words, with checkpoints, and reading a set of words with it."""

import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from rcmstr_fast import random
from rcmstr_fast.config import ConfigError, RunError
from rcmstr_fast.evaluation.config import ProbeConfig
from rcmstr_fast.evaluation.decoder_data import Feed, ahead
from rcmstr_fast.evaluation.metrics import score
from rcmstr_fast.evaluation.protocols import Protocol
from rcmstr_fast.evaluation.recogniser import Recogniser
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.log import Meter, RunLog
from rcmstr_fast.train.optim import apply_gradients
from rcmstr_fast.train.runfolder import RunFolder
from rcmstr_fast.train.signals import StopSignals

_VALIDATIONS = 20
#: Share of the steps in which the learning rate rises, as PARSeq has it.
_RISE = 0.075
_LINE_SECONDS = 10

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """Lengths of a run.

    Attributes:
        batch_size: words a step.
        steps_per_epoch: whole batches an epoch; the rest of each shuffled epoch is left out.
        total_steps: steps of the run.
        eval_every: steps between validations.
    """

    batch_size: int
    steps_per_epoch: int
    total_steps: int
    eval_every: int

    @classmethod
    def make(cls, config: ProbeConfig, words: int) -> "Schedule":
        """Lengths for a number of training words."""
        batch = min(config.batch_size, words)
        per_epoch = words // batch
        total = config.steps or config.epochs * per_epoch
        return cls(batch, per_epoch, total, config.eval_every or math.ceil(total / _VALIDATIONS))

    def slots(self, step: int) -> tuple[int, np.ndarray]:
        """Epoch of a 0-based step, and the slots of its words in that epoch."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        return epoch, np.arange(inside * self.batch_size, (inside + 1) * self.batch_size)


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Pass items on; a bar with the time left on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, leave=False, file=sys.stderr, delay=1, dynamic_ncols=True)
        return
    began = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said > _LINE_SECONDS:
            left = (now - began) / done * (total - done)
            _log.info("%s: %d of %d batches, eta %s", what, done, total, tqdm.format_interval(left))
            said = now
        yield item


def read_words(recogniser: Recogniser, feed: Feed, batch_size: int, what: str) -> tuple[list[str], list[float]]:
    """Read every word of a feed with the recogniser in evaluation mode.

    Args:
        recogniser: left in evaluation mode.
        feed: the words.
        batch_size: words a forward pass.
        what: shown beside the progress.
    Returns:
        Texts and confidences in the order of the words; a broken picture reads as nothing, with confidence 0.
    """
    recogniser.eval()
    texts: list[str] = []
    confidences: list[float] = []
    batches = list(feed.batches(batch_size))
    with torch.no_grad():
        for positions, loaded in progress(ahead(feed.load, batches), len(batches), what):
            frames = feed.frames(positions, loaded, 0, positions)
            read, confidence = recogniser.read(frames)
            texts += read
            confidences += confidence
    for position in feed.images.broken:
        texts[position], confidences[position] = "", 0.0
    return texts, confidences


class Fit:
    """One training run.

    Attributes:
        step: steps done.
        lr: learning rate of the last step.
        best: step, accuracy and ned of the best validation so far, and its state is in `best.pt`; None before.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        config: ProbeConfig,
        schedule: Schedule,
        world: World,
        folder: RunFolder,
        identity: str,
    ) -> None:
        """Prepare the optimiser.

        Args:
            recogniser: on its device.
            config: checked.
            schedule: lengths of the run.
            world: the device, one process.
            folder: where checkpoints go.
            identity: digest of what the run starts from; a checkpoint of another one is refused.
        """
        self.recogniser, self.config, self.schedule, self.world, self.folder = (
            recogniser, config, schedule, world, folder,
        )  # fmt: skip
        self.identity = identity
        self.parameters = [p for p in recogniser.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.lr, fused=True)
        self.scheduler = OneCycleLR(
            self.optimizer, config.lr, total_steps=schedule.total_steps, pct_start=_RISE, cycle_momentum=False,
            div_factor=20, final_div_factor=1000,
        )  # fmt: skip
        self.meter = Meter()
        self.step = 0
        self.lr = config.lr
        self.best: dict[str, float] | None = None
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def restore(self) -> None:
        """Continue from the newest checkpoint of the folder, if there is one.

        Raises:
            ConfigError: it is damaged, or of a run with another start.
        """
        path = checkpoint.newest(self.folder.checkpoints)
        if path is None:
            return
        state = checkpoint.load(path)
        if state.get("identity") != self.identity:
            raise ConfigError(
                f"run: {self.folder.path} was started with another encoder or other words than those found now; "
                "name another folder"
            )
        self.recogniser.load_changes(state["recogniser"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.meter.load_state_dict(state["meter"], self.world)
        torch.set_rng_state(state["rng"])
        if self.world.device.type == "cuda" and state["rng_cuda"] is not None:
            torch.cuda.set_rng_state(state["rng_cuda"], self.world.device)
        self.step, self.best = state["step"], state["best"]

    def save(self) -> None:
        """Write `last.pt`."""
        cuda = self.world.device.type == "cuda"
        state: dict[str, Any] = {
            "identity": self.identity,
            "step": self.step,
            "best": self.best,
            "recogniser": self.recogniser.changes(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "meter": self.meter.state_dict(self.world),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.world.device) if cuda else None,
        }
        checkpoint.save(self.folder.last, state, keep_previous=True)

    def load_best(self) -> None:
        """Give the recogniser the weights of the best validation."""
        self.recogniser.load_changes(checkpoint.load(self.folder.best)["recogniser"])

    def run(self, train: Feed, val: Feed, protocol: Protocol, log: RunLog) -> None:
        """Train to the last step; the best validation is in `best.pt` then.

        Raises:
            RunError: a signal (after a checkpoint), or no step of a logging window had a finite loss.
            ConfigError: no picture of a batch could be decoded.
        """
        waited = 0.0
        log.begin(self.step, self.schedule.total_steps)
        with StopSignals() as signals:
            batches = ahead(
                train.load, (self._positions(train, s) for s in range(self.step, self.schedule.total_steps))
            )
            while True:
                began = time.monotonic()
                positions, loaded = next(batches, (None, None))
                waited += time.monotonic() - began
                if positions is None:
                    break
                self._train_step(train, positions, loaded)
                log.advance()
                if self.step % self.config.log_every == 0 or self.step == self.schedule.total_steps:
                    self._log_line(log, waited)
                if self.step % self.schedule.eval_every == 0 or self.step == self.schedule.total_steps:
                    self._validate(val, protocol, log)
                    self.save()
                if signals.received:
                    self.save()
                    number = int(signals.received)
                    raise RunError(f"stopped by signal {number} at step {self.step}, saved", status=128 + number)

    def _positions(self, train: Feed, step: int) -> np.ndarray:
        epoch, slots = self.schedule.slots(step)
        if epoch != self._epoch:
            index = torch.arange(len(train))
            draws = random.words(index, 1, seed=self.config.seed, stream=random.SAMPLER, epoch=epoch)
            self._epoch, self._order = epoch, random.permutation(draws[:, 0]).numpy()
        return self._order[slots]

    def _train_step(self, train: Feed, positions: np.ndarray, loaded: np.ndarray | None) -> None:
        self.recogniser.train()
        epoch, slots = self.schedule.slots(self.step)
        frames = train.frames(positions, loaded, epoch, slots)
        good = [i for i, position in enumerate(positions.tolist()) if position not in train.images.broken]
        if not good:
            raise ConfigError(f"train: none of the {len(positions)} pictures of a batch could be decoded")
        texts: Sequence[str] = [train.labels[positions[i]] for i in good]
        loss = self.recogniser.loss(frames if len(good) == len(frames) else frames[good], texts)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        finite = torch.isfinite(norm) & torch.isfinite(loss.detach())
        self.lr = self.scheduler.get_last_lr()[0]
        apply_gradients(self.optimizer, self.lr, norm, finite, self.config.clip)
        self.meter.add({"loss": loss, "grad_norm": norm}, finite)
        self.scheduler.step()
        self.step += 1

    def _log_line(self, log: RunLog, waited: float) -> None:
        means = self.meter.read(self.world)
        if means["loss"] is None:
            raise RunError(f"step {self.step}: no finite loss since the last line; lower lr, or use precision=fp32")
        speed = log.speed(self.step, self.schedule.batch_size, waited)
        log.write({"step": self.step, **means, "lr": self.lr, **speed})

    def _validate(self, val: Feed, protocol: Protocol, log: RunLog) -> None:
        texts, _ = read_words(self.recogniser, val, self.config.batch_size, "validation")
        result = score(val.labels, [protocol.normalise(text) for text in texts])
        log.write({"step": self.step, "val_accuracy": result.accuracy, "val_ned": result.ned, "val_cer": result.cer})
        if self.best is None or (result.accuracy, result.ned) > (self.best["accuracy"], self.best["ned"]):
            self.best = {"step": self.step, "accuracy": result.accuracy, "ned": result.ned}
            checkpoint.save(self.folder.best, {"recogniser": self.recogniser.changes(), "step": self.step})
