"""A toy method and data for the trainer's tests; `python -m tests.train.toy RUN field=value ...` is a whole run."""

import dataclasses
import json
import os
import signal
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from rcmstr_fast import random
from rcmstr_fast.config import ConfigError, MethodConfig, PretrainConfig, RunError
from rcmstr_fast.methods import Batch, PretrainMethod, StepOutput
from rcmstr_fast.models.batch_norm import GroupedBatchNorm
from rcmstr_fast.train.loop import pretrain

IMAGES, HEIGHT, WIDTH = 40, 8, 12


class ToyEncoder(nn.Sequential):
    out_channels = 4

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), GroupedBatchNorm(4, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


class ToyMethod(PretrainMethod):
    """Contrast with a queue of keys; a momentum encoder; batch norm only where asked for."""

    def __init__(self, config, collectives):
        super().__init__(config, collectives)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.online_encoder, self.rectifier = ToyEncoder(), nn.Identity()
            self.momentum_encoder = ToyEncoder().requires_grad_(False)
            self.register_buffer("queue", torch.randn(16, 4))
        if config.method.bn_group_size == 2:  # no exchange between images: the same result however they are divided
            for encoder in (self.online_encoder, self.momentum_encoder):
                encoder[1] = nn.Identity()
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.keys = []

    def exported(self):
        return {"encoder": self.online_encoder, "rectifier": self.rectifier}

    def begin_step(self, progress=None):
        with torch.no_grad():
            for key, query in zip(self.momentum_encoder.parameters(), self.online_encoder.parameters(), strict=True):
                key.lerp_(query, 0.1)

    def forward(self, batch, *, monitor=True, pictures=False):
        query = F.normalize(self.online_encoder(batch.views["query"]).flatten(1), dim=1)
        with torch.no_grad():
            key = F.normalize(self.momentum_encoder(batch.views["key"]).flatten(1), dim=1)
        self.keys.append(self.collectives.gather(key))
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.T], dim=1) / 0.2
        loss_info = F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))
        watched = {"accuracy_word": (logits.argmax(1) == 0).float().mean()} if monitor else {}
        sheet = {"masked": batch.views["query"] * 0.5 + 0.5} if pictures else {}
        return StepOutput(loss_info, {"loss_info": loss_info.detach()}, watched, sheet)

    def end_step(self, finite=None):
        for keys in self.keys:
            places = (self.pointer + torch.arange(len(keys))) % len(self.queue)
            self.queue[places] = torch.nan_to_num(keys)
            self.pointer.copy_((self.pointer + len(keys)) % len(self.queue))
        self.keys = []


class ToyStream:
    """Noise that is a function of (seed, epoch, slot); steps in `poison` get NaN on the last process."""

    def __init__(self, config, poison=(), images=IMAGES, on_step=None):
        self.config, self.poison, self.on_step = config, set(poison), on_step or (lambda step: None)
        self.epoch_size, self.waited, self.broken = images, 0.0, 0
        self.images, self.fingerprint = images, f"{images:032x}"

    def batches(self, step, plan, world):
        parts = plan.local_batch // plan.micro_batch
        while True:
            self.on_step(step)
            epoch, inside = divmod(step, plan.steps_per_epoch)
            micro = []
            for part in range(parts):
                first = inside * plan.global_batch + (part * world.world_size + world.rank) * plan.micro_batch
                index = torch.arange(first, first + plan.micro_batch)
                count = 6 * HEIGHT * WIDTH
                drawn = random.words(index, count, seed=self.config.seed, stream=random.SUBSET, epoch=epoch)
                views = random.uniform(drawn).view(-1, 2, 3, HEIGHT, WIDTH).transpose(0, 1) * 2 - 1
                if step in self.poison and world.rank == world.world_size - 1:
                    views = views * float("nan")
                images = torch.zeros(len(index), HEIGHT, WIDTH, 3, dtype=torch.uint8)
                micro.append(Batch({"query": views[0], "key": views[1]}, index, epoch, images=images))
            step += 1
            yield micro


def toy_config(run, method=None, **fields) -> PretrainConfig:
    """Five steps of 8 images an epoch, 12 steps; `fields` by dotted name with __ for the dot."""
    config = PretrainConfig(run=str(run), method=method or MethodConfig("toy"))
    defaults = {
        "train__global_batch_size": 8,
        "train__steps": 12,
        "train__log_every": 2,
        "train__save_every": 5,
        "train__device": "cpu",
        "train__precision": "fp32",
        "optim__lr": 0.01,
    }
    for name, value in (defaults | fields).items():
        *parts, last = name.split("__")
        place = config
        for part in parts:
            place = getattr(place, part)
        assert last in {f.name for f in dataclasses.fields(place)}, name
        setattr(place, last, value)
    return config


def toy_run(run, *, poison=(), images=IMAGES, on_step=None, **fields):
    """pretrain with the toy method and data."""
    config = toy_config(run, **fields)
    return pretrain(config, build=ToyMethod, open_stream=lambda c: ToyStream(c, poison, images, on_step))


def main(argv: list[str]) -> int:
    """A run in a process of its own.

    `sleep` seconds a step; `kill` or `term` itself before a step, on process `rank` only; further fields.
    """
    torch.set_num_threads(1)
    options = dict(word.split("=", 1) for word in argv[1:])
    sleep, chosen = float(options.pop("sleep", 0)), options.pop("rank", "0")
    deadly = {int(options.pop("kill", -1)): signal.SIGKILL, int(options.pop("term", -2)): signal.SIGTERM}
    poison = [int(x) for x in options.pop("poison", "").split(",") if x]

    def on_step(step):
        time.sleep(sleep)
        if step in deadly and os.environ.get("RANK", "0") == chosen:
            os.kill(os.getpid(), deadly[step])

    try:
        toy_run(argv[0], poison=poison, on_step=on_step, **{k: json.loads(v) for k, v in options.items()})
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return getattr(error, "status", 2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
