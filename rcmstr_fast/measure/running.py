"""The trainer's step as something to measure: the only file of this room that knows the inside of method and trainer."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.methods.parts.labels import LabelSettings
from rcmstr_fast.methods.protocol import Batch
from rcmstr_fast.methods.registry import build_method, find
from rcmstr_fast.models.placing import placed
from rcmstr_fast.train.distributed import World, use_bf16
from rcmstr_fast.train.plan import Plan, make_plan
from rcmstr_fast.train.runfolder import RunFolder
from rcmstr_fast.train.stream import Stream
from rcmstr_fast.train.targets import Targets
from rcmstr_fast.train.trainer import OneStep, Trainer, numerics
from rcmstr_fast.train.views import ViewMaker

#: Images of the made-up epoch that a plan is made for.
_EPOCH = 1 << 20


@dataclass(frozen=True)
class StepInputs:
    """What a step is given, for providers that are not ours.

    Attributes:
        query: [B, 3, H, W] normalised; the query view.
        key: like query; the key view.
        permuted: like query, with its strips in `order`; None where the method makes it itself or needs none.
        order: [B, N] int64; None as `permuted`.
        index: [B] int64 slots of the epoch.
        epoch: 0-based.
    """

    query: Tensor
    key: Tensor
    permuted: Tensor | None
    order: Tensor | None
    index: Tensor
    epoch: int


def inputs(batch: Batch) -> StepInputs:
    """What a micro-batch gives to a step."""
    views, drawn = batch.views, batch.drawn
    return StepInputs(
        views["query"], views["key"], views.get("permuted"), drawn.get("order"), batch.index, int(batch.epoch)
    )


def made_up_plan(config: PretrainConfig, world: World) -> Plan:
    """The plan of a run whose epoch is long enough for any batch."""
    return make_plan(config, _EPOCH, world.world_size)


class OurStep:
    """The trainer's own step.

    Args:
        config: resolved.
        world: this process.
        folder: where a run would be kept; nothing is written.
        plan: of the run; None: that of a long made-up epoch.
        stream: the data; None: batches are made up.
    """

    def __init__(
        self, config: PretrainConfig, world: World, folder: Path, plan: Plan | None = None, stream: Stream | None = None
    ) -> None:
        self.config, self.world = config, world
        self.plan = plan or made_up_plan(config, world)
        method = build_method(config, world)
        self.trainer = Trainer(config, self.plan, world, RunFolder(folder), method, stream)  # type: ignore[arg-type]
        self._one = OneStep(self.trainer)

    def weights(self) -> Tensor:
        """All trained weights in one vector."""
        return torch.cat([p.detach().flatten() for p in self.trainer.method.parameters() if p.requires_grad])

    def step(self, batches: list[Batch]) -> None:
        """One optimiser step at the first learning rate."""
        self._one(batches)


def first_loss(config: PretrainConfig, world: World, batch: Batch) -> float:
    """Loss of a micro-batch in a method with its initial weights, which is made for it and forgotten."""
    method = build_method(config, world)
    placed(method, world.device)
    method.train()
    bf16 = use_bf16(config.train.precision, world.device)
    with torch.no_grad(), torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
        return float(method(batch, monitor=False).loss)


def initial_state(config: PretrainConfig, world: World) -> dict[str, Tensor]:
    """The method's initial state on the CPU."""
    return build_method(config, world).state_dict()


def made_up_batches(config: PretrainConfig, plan: Plan, world: World, count: int) -> list[list[Batch]]:
    """Steps of smooth random pictures, augmented as in training, on the device of training."""
    model, parts = config.model, plan.local_batch // plan.micro_batch
    size = (model.height, model.image_width)
    method = find(config.method.name).method
    maker = ViewMaker(method.views(config), config)
    made = []
    for number in range(count * parts):
        first = (number * world.world_size + world.rank) * plan.micro_batch
        index = torch.arange(first, first + plan.micro_batch).to(world.device)
        images = smooth_pictures(plan.micro_batch, size, seed=number).to(world.device)
        chosen = method.draw(config, index.cpu(), 0)
        if method.spec.labels:
            chosen = chosen | Targets(cast(LabelSettings, config.method))([f"word{i}" for i in index.tolist()])
        drawn = {name: x.to(world.device) for name, x in chosen.items()}
        views = maker(images, index, 0, drawn.get("order"), torch.float32)
        made.append(Batch(views, index, 0, drawn, images=images))
    return [made[i * parts : (i + 1) * parts] for i in range(count)]


def smooth_pictures(count: int, size: tuple[int, int], *, seed: int) -> Tensor:
    """Random pictures [count, H, W, 3] uint8 whose neighbouring pixels are alike, as in photographs."""
    small = torch.rand(count, 3, 8, 20, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1) * 255
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def precision_of(config: PretrainConfig, device: torch.device) -> str:
    """What the products of a step compute in: bf16 or fp32."""
    return "bf16" if use_bf16(config.train.precision, device) else "fp32"


@contextmanager
def exact_or_fast(config: PretrainConfig, device: torch.device) -> Iterator[None]:
    """The trainer's numerics, and on a GPU TF32 for products left in float32, as a baseline would train with."""
    before = torch.get_float32_matmul_precision()
    with numerics(config):
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def release(device: torch.device) -> None:
    """Give back the memory of what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def with_batch(config: PretrainConfig, batch: int) -> PretrainConfig:
    """The configuration with another batch; everything else as it is."""
    return replace(config, train=replace(config.train, global_batch_size=batch))
