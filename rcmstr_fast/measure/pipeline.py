"""What `rcmstr bench pipeline` measures: the stages of the data path, data alone, model alone, both together."""

import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from rcmstr_fast import env, timer
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.data.loader import build_decoder
from rcmstr_fast.data.sampler import EpochOrder
from rcmstr_fast.data.source import ImageSource, open_sources
from rcmstr_fast.measure.records import Row
from rcmstr_fast.measure.running import OurStep
from rcmstr_fast.methods.protocol import Batch
from rcmstr_fast.train.distributed import World, joined
from rcmstr_fast.train.plan import Plan, make_plan
from rcmstr_fast.train.stream import Stream
from rcmstr_fast.train.trainer import numerics

_WARM_UP = 2
#: Images of one timed call of a stage; a short call says little on a busy machine.
_IMAGES = 1024


@dataclass
class Rate:
    """Speed of one thing measured.

    Attributes:
        images_per_s: by the wall clock.
        per_core: images a second of processor time, over all threads; 0 where that says nothing.
    """

    images_per_s: float
    per_core: float


def interleaved(runs: dict[str, Callable[[], int]], repetitions: int) -> dict[str, Rate]:
    """Best rates of several things, timed in turn so that a busy moment hits all of them.

    Args:
        runs: name -> a call that returns how many images it has done.
        repetitions: timed calls of each, after one to warm up.
    """
    counts = {name: run() for name, run in runs.items()}
    times = timer.alternate(runs, torch.device("cpu"), rounds=repetitions, warm_up=0)  # the calls wait themselves
    return {
        name: Rate(1e3 * count / times[name].best, 1e3 * count / max(min(times[name].processor_ms), 1e-6))
        for name, count in counts.items()
    }


@dataclass
class Sample:
    """Records for timing stages one by one.

    Attributes:
        config: resolved.
        source: the records.
        batches: [b] int64 records of each batch.
        encoded: what `source.read` gives for them.
        device: where views are made.
    """

    config: PretrainConfig
    source: ImageSource
    batches: list[np.ndarray]
    encoded: list[list[bytes | None]]
    device: torch.device

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the input."""
        return self.config.model.height, self.config.model.image_width


def take_sample(config: PretrainConfig, plan: Plan, device: torch.device) -> Sample:
    """The first batches of epoch 0, about a thousand images."""
    source = open_sources(config.data.roots)
    order = EpochOrder(source.sizes, config.data.weights, config.data.epoch_size, config.seed)
    count = min(max(1, _IMAGES // plan.micro_batch), order.epoch_size // plan.micro_batch)
    batches = [order.slots(0, i * plan.micro_batch, plan.micro_batch)[1] for i in range(count)]
    return Sample(config, source, batches, [source.read(records) for records in batches], device)


def read_run(sample: Sample) -> Callable[[], int]:
    """Reads the encoded pictures."""
    return lambda: sum(len(sample.source.read(records)) for records in sample.batches)


def decode_run(sample: Sample, stack: ExitStack, decoder: str) -> Callable[[], int]:
    """Decodes and resizes pictures that are in memory; `stack` ends its threads."""
    data, workers = sample.config.data, sample.config.data.workers or env.threads()
    height, width = sample.size
    pool = stack.enter_context(ThreadPoolExecutor(workers))
    data = replace(data, decoder=cast(Any, decoder))
    made = build_decoder(data, height=height, width=width, batch=len(sample.batches[0]), workers=workers)

    def run() -> int:
        for encoded in sample.encoded:
            images, _ = made.load(_in_memory(encoded), np.arange(len(encoded)), pool, workers)
            wait(images.device)
        return sum(len(encoded) for encoded in sample.encoded)

    return run


def _in_memory(encoded: list[bytes | None]) -> Callable[[np.ndarray], list[bytes | None]]:
    return lambda places: [encoded[i] for i in places]


def augment_run(sample: Sample, stream: Stream) -> Callable[[], int]:
    """Makes the views (and the permuted query view) of random pictures as the trainer does; counts images.

    On a GPU the pictures are sent there as in training, from page-locked memory.
    """
    count = len(sample.batches[0])
    images = torch.randint(0, 256, (count, *sample.size, 3), dtype=torch.uint8)
    prepared = [stream.inputs(images, torch.arange(count), epoch) for epoch in range(len(sample.batches))]

    def run() -> int:
        for epoch, inputs in enumerate(prepared):
            stream.views(inputs, epoch)
        wait(sample.device)
        return count * len(sample.batches)

    return run


def wait(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Report:
    """Result of `measure`; rates in images/s of this process.

    Attributes:
        stages: read, decode (with the resizing) and augment, one after the other in its own threads.
        data: the whole data path alone.
        model: the training step alone, on one batch again and again.
        both: training.
        wait_percent: share of `both` that the step waited for data.
    """

    stages: dict[str, Rate]
    data: float
    model: float
    both: float
    wait_percent: float

    @property
    def verdict(self) -> str:
        """Which side is the slower one, and by how much."""
        slower, faster = sorted((("data", self.data), ("model", self.model)), key=lambda side: side[1])
        stage = min(self.stages, key=lambda name: self.stages[name].images_per_s)
        hint = f"; its slowest stage is {stage}" if slower[0] == "data" else ""
        return (
            f"the {slower[0]} is the slower side: {slower[1]:.0f} images/s, the {faster[0]} alone makes "
            f"{faster[1]:.0f} ({faster[1] / slower[1]:.2f}x){hint}"
        )


def measure(config: PretrainConfig, *, seconds: float, repetitions: int) -> Report:
    """Measure the data path and the training step of a configuration; nothing is written.

    Args:
        config: resolved.
        seconds: length of each of the three measurements.
        repetitions: timed calls of each stage.
    Raises:
        ConfigError: the data or the batch do not fit.
    """
    with ExitStack() as stack:
        world = stack.enter_context(joined(config.train.device))
        stack.enter_context(numerics(config))
        stream = Stream(config)
        plan = make_plan(config, stream.epoch_size, world.world_size)
        stream.prepare(plan, world.device)
        sample = take_sample(config, plan, world.device)
        runs = {
            "read": read_run(sample),
            "decode": decode_run(sample, stack, config.data.decoder),
            "augment": augment_run(sample, stream),
        }
        stages = interleaved(runs, repetitions)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        step = OurStep(config, world, folder, plan, stream).step
        data, first, _ = _timed(stream, plan, world, seconds, lambda batches: None)
        model, _, _ = _timed(_Same(first), plan, world, seconds, step)
        both, _, waited = _timed(stream, plan, world, seconds, step)
        return Report(stages, data, model, both, waited)


class _Same:
    """A stream of one step's batches again and again."""

    waited = 0.0

    def __init__(self, batches: list[Batch]) -> None:
        self._kept = batches

    def batches(self, step: int, plan: Plan, world: World) -> Generator[list[Batch], None, None]:
        while True:
            yield self._kept


def _timed(
    stream: Stream | _Same, plan: Plan, world: World, seconds: float, step: Callable[[list[Batch]], None]
) -> tuple[float, list[Batch], float]:
    """Images/s of `step` over the stream for about `seconds`, the last batches, and the share of waiting in percent."""
    with closing(stream.batches(0, plan, world)) as found:  # type: ignore[type-var]
        for _ in range(_WARM_UP):
            kept = next(found)
            step(kept)
        wait(world.device)
        done, begun, waited = 0, time.perf_counter(), stream.waited
        while time.perf_counter() - begun < seconds or done == 0:
            kept = next(found)
            step(kept)
            done += 1
            if done % 8 == 0:
                wait(world.device)  # the clock must not run ahead of the device
        wait(world.device)
        length = time.perf_counter() - begun
        return done * plan.local_batch / length, kept, 100 * (stream.waited - waited) / length


def sample(config: PretrainConfig) -> Sample:
    """A sample of the data of a resolved configuration, for one process on its device."""
    with joined(config.train.device) as world:
        return take_sample(config, make_plan(config, Stream(config).epoch_size, 1), world.device)


def text(report: Report) -> str:
    """A report for reading."""
    lines = [f"{'stage':<10}{'images/s':>12}{'a core':>12}"]
    for name, rate in report.stages.items():
        lines.append(f"{name:<10}{rate.images_per_s:>12.0f}{rate.per_core:>12.0f}")
    for name in ("data", "model", "both"):
        lines.append(f"{name:<10}{getattr(report, name):>12.0f}")
    return "\n".join([*lines, f"{report.wait_percent:.1f} % of the training time is waiting for data", report.verdict])


def line(row: Row) -> str:
    """One printed line of a stage's provider."""
    head = f"{row['stage']:<8} {row['provider']:<40}"
    if row["status"] != "ok":
        return f"{head} {row['status']}"
    speed = f"{head} {row['images_per_s']:>10.0f} images/s {row['per_core']:>10.0f} a core"
    if "ours_is" not in row:
        return speed
    return f"{speed}, the first is {row['ours_is']:.2f}x as fast, {row['ours_is_per_core']:.2f}x a core"
