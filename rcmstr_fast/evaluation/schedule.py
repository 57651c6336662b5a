"""How a decoder is trained: lengths of the run, order of the words, optimiser and learning rate of a step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.sampler import EpochOrder
from rcmstr_fast.evaluation.config import TrainedConfig
from rcmstr_fast.train.adadelta import Adadelta
from rcmstr_fast.train.optim import RATE, is_vector

_VALIDATIONS = 20
#: Share of the steps in which the one-cycle rate rises, as PARSeq has it, and by how much it is lower at both ends.
_RISE, _START, _END = 0.075, 20, 20_000


@dataclass(frozen=True)
class Schedule:
    """Lengths of a run.

    Attributes:
        batch_size: words a step, over all processes and micro-batches.
        steps_per_epoch: whole batches an epoch; the rest of each shuffled epoch is left out.
        total_steps: steps of the run.
        eval_every: steps between validations.
        warmup_steps: steps of linear warm-up (schedules cosine and step).
    """

    batch_size: int
    steps_per_epoch: int
    total_steps: int
    eval_every: int
    warmup_steps: int = 0

    @classmethod
    def make(cls, config: TrainedConfig, words: int, processes: int = 1) -> "Schedule":
        """Lengths for a number of training words.

        Raises:
            ConfigError: the batch cannot be divided over processes and micro-batches.
        """
        parts = processes * config.accumulate
        if config.batch_size % parts or words < parts:
            raise ConfigError(
                f"batch_size must be a multiple of processes * accumulate = {processes} * {config.accumulate} and "
                f"there must be a word for each, got {config.batch_size} and {words} training words"
            )
        batch = min(config.batch_size, words // parts * parts)
        per_epoch = words // batch
        total = config.steps or config.epochs * per_epoch
        warmup = config.warmup_steps
        if warmup is None:
            warmup = total // 10 if config.resolved_schedule == "cosine" else 0
        return cls(batch, per_epoch, total, config.eval_every or math.ceil(total / _VALIDATIONS), warmup)


@dataclass(frozen=True)
class Micro:
    """The words of one forward pass of this process.

    Attributes:
        step: 0-based, of the run.
        epoch: 0-based.
        slots: `[n]` int64, their numbers in the epoch, `index` of the augmentation.
        positions: `[n]` int64, which of the training words they are.
        batch: `[batch_size]` int64, the positions of the whole step.
        last: no more of this step follow.
    """

    step: int
    epoch: int
    slots: np.ndarray
    positions: np.ndarray
    batch: np.ndarray
    last: bool


class Order:
    """Which words each step shows, and which of them this process.

    Args:
        schedule: lengths of the run.
        sizes: words of each training root, in their order.
        weights: relative share of each root in an epoch; empty: by size.
        seed: of the run.
    Raises:
        ConfigError: weights that do not fit the roots.
    """

    def __init__(self, schedule: Schedule, sizes: list[int], weights: list[float], seed: int) -> None:
        if weights and (len(weights) != len(sizes) or 0 in sizes):
            raise ConfigError(
                f"train_weights must be one positive number for each of {len(sizes)} roots, each with usable words "
                f"(they have {sizes}), got {list(weights)}"
            )
        self.schedule = schedule
        self._order = EpochOrder(sizes, weights, seed=seed)

    def batch(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Epoch of a 0-based step, and the slots and positions of its words."""
        epoch, inside = divmod(step, self.schedule.steps_per_epoch)
        size = self.schedule.batch_size
        return epoch, *self._order.slots(epoch, inside * size, size)

    def micros(self, first: int, accumulate: int, rank: int, processes: int, owned: bool) -> Iterator[Micro]:
        """The micro-batches of one process from step `first` to the end.

        Args:
            first: 0-based step.
            accumulate: micro-batches a step.
            rank: of this process.
            processes: their number.
            owned: the process works on the words whose position is its own (position % processes == rank), whose
                frames it keeps; otherwise on equal consecutive parts of the batch.
        """
        for step in range(first, self.schedule.total_steps):
            epoch, slots, positions = self.batch(step)
            if owned:
                mine = np.array_split(np.flatnonzero(positions % processes == rank), accumulate)
            else:
                mine = list(np.split(np.arange(len(positions)), processes * accumulate)[rank::processes])
            for number, chosen in enumerate(mine):
                yield Micro(step, epoch, slots[chosen], positions[chosen], positions, number == accumulate - 1)


def learning_rate(step: int, config: TrainedConfig, schedule: Schedule) -> float:
    """Learning rate of the 0-based step.

    one_cycle: up by half a cosine in 7.5 % of the steps from lr / 20, down by another to lr / 20,000, as torch's
    OneCycleLR has it. cosine: linear warm-up, then half a cosine to `min_lr`. step: after the warm-up lr, a tenth of it
    from 60 % of the run on, a hundredth from 80 % on (SeqCLR, appendix C).
    """
    lr, total = config.resolved_lr, schedule.total_steps
    if config.resolved_schedule == "one_cycle":
        top = _RISE * total - 1
        if step <= top:
            return _between(lr / _START, lr, step / top if top > 0 else 1.0)
        return _between(lr, lr / _END, (step - top) / (total - 1 - top))
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    if config.resolved_schedule == "step":
        return lr * 0.1 ** sum(10 * step >= tenths * total for tenths in (6, 8))
    part = (step - schedule.warmup_steps) / max(1, total - schedule.warmup_steps)
    return _between(lr, min(config.min_lr, lr), min(part, 1.0))


def _between(start: float, end: float, part: float) -> float:
    """Half a cosine from start (part 0) to end (part 1)."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))


def build_optimizer(recogniser: nn.Module, config: TrainedConfig) -> torch.optim.Optimizer:
    """Adam, AdamW or AdaDelta over the parameters that need a gradient.

    AdamW leaves out biases, norms and tokens from its weight decay; the others decay everything, as their papers do.
    With `layer_decay` a layer's rate is the run's times layer_decay to the number of layers above it.
    """
    rates = layer_rates(recogniser, config.layer_decay)
    decay, plain = config.resolved_weight_decay, config.optimizer != "adamw"
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in recogniser.named_parameters():
        if parameter.requires_grad:
            key = rates.get(name, 1.0), decay if plain or not is_vector(parameter) else 0.0
            group = groups.setdefault(key, {"params": [], RATE: key[0], "weight_decay": key[1]})
            group["params"].append(parameter)
    if config.optimizer == "adadelta":
        return Adadelta(list(groups.values()), lr=config.resolved_lr, rho=0.95)
    made = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return made(list(groups.values()), lr=config.resolved_lr, fused=True)


def layer_rates(recogniser: nn.Module, decay: float) -> dict[str, float]:
    """Factor of the learning rate of each parameter of the encoder and rectifier by its name; all others have 1.

    A ViT's layers are the patches (with their tokens), each block, and the rest above them; a CNN's are its stages.
    """
    encoder = recogniser.encoder
    kind, first = ("blocks", 1) if hasattr(encoder, "blocks") else ("stages", 0)
    top = len(getattr(encoder, kind)) + first
    rates = {}
    for name, _ in recogniser.named_parameters():
        area, _, rest = name.partition(".")
        layer = top
        if area == "rectifier" or rest.startswith(("patch_embed.", "mask_token", "cls_token")):
            layer = 0
        elif area == "encoder" and rest.startswith(f"{kind}."):
            layer = int(rest.split(".")[1]) + first
        rates[name] = decay ** (top - layer)
    return rates
