"""Tiny trainers of any method on made-up pictures, in this process or, by `main`, in two."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from rcmstr_fast import random
from rcmstr_fast.config import PretrainConfig, resolve
from rcmstr_fast.methods import VIT, Batch, build_method, find
from rcmstr_fast.train.distributed import World, joined
from rcmstr_fast.train.plan import make_plan
from rcmstr_fast.train.runfolder import RunFolder
from rcmstr_fast.train.signals import StopSignals
from rcmstr_fast.train.targets import Targets
from rcmstr_fast.train.trainer import Trainer
from rcmstr_fast.train.views import ViewMaker

CPU = World(torch.device("cpu"))
BATCH, STEPS_AN_EPOCH, COMPARED = 8, 3, 2


def case_config(name: str, encoder: str, *, accumulate: int = 1, precision: str = "fp32") -> PretrainConfig:
    """The smallest configuration of a method on an encoder."""
    spec = find(name)
    config = PretrainConfig()
    config.method = spec.config(**{k: v for k, v in (spec.tiny or {}).items() if "." not in k})
    model, optim, train = config.model, config.optim, config.train
    model.encoder, model.width, model.depth = encoder, 0.25, 1
    model.image_width = 32 if encoder in VIT else 36
    model.projector_hidden, model.feature_dim = 16, 16
    optim.lr, optim.warmup_steps = 1e-3, 4
    train.global_batch_size, train.steps, train.precision, train.accumulate = BATCH, 100, precision, accumulate
    for dotted, value in (spec.tiny or {}).items():
        if "." in dotted:
            part, field = dotted.split(".")
            setattr(getattr(config, part), field, value)
    return resolve(config)


def make_trainer(config: PretrainConfig, folder: Path, world: World = CPU) -> Trainer:
    """A trainer without a stream; its steps are taken by `take`."""
    config.run = str(folder)
    plan = make_plan(config, STEPS_AN_EPOCH * BATCH, world.world_size)
    return Trainer(config, plan, world, RunFolder(folder), build_method(config, world), None)


def batches(trainer: Trainer, step: int) -> list[Batch]:
    """The micro-batches of a step of this process."""
    config, plan, world = trainer.config, trainer.plan, trainer.world
    spec, epoch = find(config.method.name), step // STEPS_AN_EPOCH
    maker, made = ViewMaker(spec.method.views(config), config), []
    for part in range(plan.local_batch // plan.micro_batch):
        first = (part * world.world_size + world.rank) * plan.micro_batch
        index = torch.arange(first, first + plan.micro_batch) + step % STEPS_AN_EPOCH * BATCH
        drawn = spec.method.draw(config, index, epoch)
        images = pictures(index, config.model.height, config.model.image_width)
        views = maker(images, index, epoch, drawn.get("order"), torch.float32)
        if config.train.precision == "fp64":
            views = {name: view.double() for name, view in views.items()}
        if spec.labels:
            drawn |= Targets(config.method)([None if i % 5 == 4 else f"word{i}" for i in index.tolist()])
        made.append(Batch(views, index, epoch, drawn, images=images))
    return made


def pictures(index: Tensor, height: int, width: int) -> Tensor:
    """Blocks of random colours: uint8 [B, height, width, 3]."""
    drawn = random.words(index, 4 * (width // 4) * 3, seed=7, stream=99, epoch=0) >> 24
    blocks = drawn.reshape(len(index), 4, width // 4, 3)
    return blocks.repeat_interleave(height // 4, 1).repeat_interleave(4, 2).to(torch.uint8)


def take(trainer: Trainer, steps: int) -> Trainer:
    """Steps as the loop takes them, without monitors."""
    for step in range(trainer.step, trainer.step + steps):
        trainer._train_step(batches(trainer, step), StopSignals(), False, False)
        trainer.step = step + 1
    return trainer


def outcome(trainer: Trainer) -> dict[str, Tensor]:
    """Parameters and mean terms after the steps; every process must call it."""
    state = {name: x.detach().clone() for name, x in trainer.method.named_parameters()}
    terms = trainer.meter.read(trainer.world)
    return state | {f"term {name}": torch.tensor(float(value or 0.0)) for name, value in terms.items()}


def main(argv: list[str]) -> int:
    """COMPARED steps of every case in the processes of torchrun's environment: FOLDER NAME:ENCODER .."""
    torch.set_num_threads(1)
    folder = Path(argv[0])
    with joined("cpu") as world:
        for case in argv[1:]:
            name, encoder = case.split(":")
            config = case_config(name, encoder, precision="fp64")
            result = outcome(take(make_trainer(config, folder / case, world), COMPARED))
            if world.rank == 0:
                torch.save(result, folder / f"{name}_{encoder}.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
