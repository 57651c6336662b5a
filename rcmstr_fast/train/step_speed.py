"""What `rcmstr bench step` measures: whole training steps on made-up views, against their floor and other providers.

A provider is built from the same weights, its loss of the first batch is compared with ours, and only then is it timed.
On a CPU providers take turns, step by step, so that a busy machine meets all of them; on a GPU each is alone, for its
peak memory, and is timed with events.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.methods import Batch, build_method, find
from rcmstr_fast.methods.levels import RelationalSettings
from rcmstr_fast.train.costs import DATA_SHEET, Ceilings, measure_ceilings, step_works
from rcmstr_fast.train.distributed import World, use_bf16
from rcmstr_fast.train.loop import Trainer, numerics
from rcmstr_fast.train.plan import Plan, make_plan
from rcmstr_fast.train.runfolder import RunFolder
from rcmstr_fast.train.signals import StopSignals
from rcmstr_fast.train.views import ViewMaker

#: Largest relative difference of the first loss from ours, by precision.
AGREEMENT = {"fp32": 1e-4, "bf16": 2e-2}
#: Name, and the keys of a row by which two records are compared.
IDENTITY = ("provider", "encoder", "width", "method", "batch", "processes", "precision", "device")
_EPOCH = 1 << 20
_BATCHES = 2


class StepProvider(Protocol):
    """One way to run a training step."""

    def first_loss(self, batch: Batch) -> float:
        """Loss of a batch with the weights it was made with."""
        ...

    def step(self, batches: list[Batch]) -> None:
        """One whole step; does not wait for the device."""
        ...


#: (resolved config, device, state dict of the method on the CPU) -> provider
Factory = Callable[[PretrainConfig, torch.device, dict[str, Tensor]], StepProvider]


class OurStep:
    """The trainer's own step.

    Args:
        config: resolved.
        world: this process.
        folder: where a run would be kept; nothing is written.
    """

    def __init__(self, config: PretrainConfig, world: World, folder: Path) -> None:
        self.plan = make_plan(config, _EPOCH, world.world_size)
        self.trainer = Trainer(config, self.plan, world, RunFolder(folder), build_method(config, world), None)  # type: ignore[arg-type]
        self._signals = StopSignals()

    def first_loss(self, batch: Batch) -> float:
        """Loss of a batch, computed by a second method with the same initial weights: the trainer stays as it is."""
        device = self.trainer.world.device
        method = self._initial().to(device, memory_format=torch.channels_last).train()
        bf16 = use_bf16(self.trainer.config.train.precision, device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = method(batch, monitor=False)
        return float(output.loss)

    def state(self) -> dict[str, Tensor]:
        """The method's initial state on the CPU."""
        return self._initial().state_dict()

    def _initial(self) -> torch.nn.Module:
        return build_method(self.trainer.config, self.trainer.world)

    def step(self, batches: list[Batch]) -> None:
        """One optimiser step at the first learning rate."""
        self.trainer._train_step(batches, self._signals, False, False)
        self.trainer.step = 0


def made_up_batches(config: PretrainConfig, plan: Plan, world: World, count: int) -> list[list[Batch]]:
    """Steps of smooth random pictures, augmented as in training, on the device of training."""
    model, parts = config.model, plan.local_batch // plan.micro_batch
    size = (model.height, model.image_width)
    method = find(config.method.name).method
    maker = ViewMaker(method.views(config), config)
    made = []
    for number in range(count * parts):
        generator = torch.Generator().manual_seed(number)
        first = (number * world.world_size + world.rank) * plan.micro_batch
        index = torch.arange(first, first + plan.micro_batch)
        small = torch.rand(plan.micro_batch, 3, 8, 20, generator=generator)
        smooth = torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1) * 255
        images = smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous().to(world.device)
        index = index.to(world.device)
        drawn = {name: x.to(world.device) for name, x in method.draw(config, index.cpu(), 0).items()}
        views = maker(images, index, 0, drawn.get("order"), torch.float32)
        made.append(Batch(views, index, 0, drawn, images=images))
    return [made[i * parts : (i + 1) * parts] for i in range(count)]


@dataclass
class Measured:
    """Times of one provider.

    Attributes:
        ms: of each timed step.
        peak_gib: largest allocation while it ran, with everything it keeps; 0 on a CPU.
        reserved_gib: what the allocator took from the device for it; 0 on a CPU.
    """

    ms: list[float]
    peak_gib: float = 0.0
    reserved_gib: float = 0.0


def time_in_turn(
    steps: dict[str, Callable[[int], None]], device: torch.device, repetitions: int, warm_up: int
) -> dict[str, Measured]:
    """Time calls of several steps in turn; the argument of a call is its number.

    Args:
        steps: name -> step.
        device: where they run.
        repetitions: timed calls of each.
        warm_up: calls of each before.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    for run in steps.values():
        for i in range(warm_up):
            run(i)
    times: dict[str, list] = {name: [] for name in steps}
    for i in range(repetitions):
        for name, run in steps.items():
            if cuda:
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                marks[0].record()
                run(i)
                marks[1].record()
                times[name].append(marks)
            else:
                start = time.perf_counter()
                run(i)
                times[name].append(1e3 * (time.perf_counter() - start))
    if not cuda:
        return {name: Measured(found) for name, found in times.items()}
    torch.cuda.synchronize(device)
    memory = [x(device) / 2**30 for x in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)]
    return {name: Measured([a.elapsed_time(b) for a, b in found], *memory) for name, found in times.items()}


def measure(
    config: PretrainConfig,
    world: World,
    factories: dict[str, Factory],
    repetitions: int,
    ceilings: Ceilings | None = None,
) -> list[dict[str, Any]]:
    """Rows of one configuration: ours first, then every other provider.

    Args:
        config: resolved; its batch is that of all processes.
        world: this process.
        factories: other providers by name; they run on one process only.
        repetitions: timed steps of each.
        ceilings: of the device; None: measured now.
    Raises:
        ConfigError: the batch does not fit the processes, or other providers are asked for on several.
    """
    if factories and world.world_size > 1:
        raise ConfigError(f"several processes measure provider ours alone, got {', '.join(factories)}")
    if config.train.precision == "fp64":
        raise ConfigError("train.precision must be auto, bf16 or fp32 for a measurement, got fp64")
    bf16 = use_bf16(config.train.precision, world.device)
    ceilings = ceilings or measure_ceilings(world.device, "bf16" if bf16 else "fp32")
    with ExitStack() as stack:
        stack.enter_context(exact_or_fast(config, world.device))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        bench = _Bench(config, world, folder, ceilings, "bf16" if bf16 else "fp32")
        return bench.rows(factories, repetitions)


class _Bench:
    """The measurement of one configuration."""

    def __init__(self, config: PretrainConfig, world: World, folder: Path, ceilings: Ceilings, precision: str) -> None:
        self.config, self.world, self.ceilings, self.precision = config, world, ceilings, precision
        self.folder = folder
        self.plan = make_plan(config, _EPOCH, world.world_size)
        self.batches = made_up_batches(config, self.plan, world, _BATCHES)
        self.warm_up = 12 if world.device.type == "cuda" else 2
        known = isinstance(config.method, RelationalSettings)  # of other methods there is no floor yet
        works = step_works(config, self.plan.local_batch, precision) if known else []
        self.flop, self.floor_ms = sum(w.flop for w in works), ceilings.ms(works)

    def rows(self, factories: dict[str, Factory], repetitions: int) -> list[dict[str, Any]]:
        """Ours and the others; one that fails or disagrees is reported and not timed."""
        world, together = self.world, self.world.device.type == "cpu"
        found: list[dict[str, Any]] = []
        ours = self._guarded("ours", found, lambda: OurStep(self.config, world, self.folder))
        if ours is None:
            return found
        expected, state = ours.first_loss(self.batches[0][0]), ours.state() if factories else {}
        providers: dict[str, StepProvider] = {"ours": ours}
        if not together:
            self._time(providers, found, repetitions)
            del ours
            providers.clear()
        for name, factory in factories.items():
            release(world.device)
            made = self._guarded(name, found, lambda factory=factory: factory(self.config, world.device, state))  # type: ignore[misc]
            if made is None or not self._agrees(name, made, expected, found):
                continue
            providers[name] = made
            del made
            if not together:
                self._time(providers, found, repetitions)
                providers.clear()
        if together:
            self._time(providers, found, repetitions)
        return found

    def _agrees(self, name: str, made: StepProvider, expected: float, found: list[dict[str, Any]]) -> bool:
        loss = self._guarded(name, found, lambda: made.first_loss(self.batches[0][0]))
        if loss is None:
            return False
        error = abs(loss - expected) / max(abs(expected), 1e-12)
        if not error <= AGREEMENT[self.precision]:
            found.append(self._head(name) | {"status": "FAIL", "error": error})
            return False
        return True

    def _guarded(self, name: str, found: list[dict[str, Any]], make: Callable[[], Any]) -> Any:
        try:
            return make()
        except ConfigError:
            raise
        except torch.cuda.OutOfMemoryError:
            found.append(self._head(name) | {"status": "out of memory"})
        except Exception as error:  # a provider's failure is a result, not the end of the run
            if name == "ours":
                raise
            found.append(self._head(name) | {"status": f"{type(error).__name__}: {str(error)[:300]}"})
        return None

    def _time(self, providers: dict[str, StepProvider], found: list[dict[str, Any]], repetitions: int) -> None:
        steps = {
            name: (lambda i, made=made: made.step(self.batches[i % _BATCHES]))  # type: ignore[misc]
            for name, made in providers.items()
        }
        names = ", ".join(steps)
        release(self.world.device)  # what only building needed must not count as its memory
        times = self._guarded(
            names, found, lambda: time_in_turn(steps, self.world.device, repetitions, self.warm_up)
        )  # fmt: skip
        for name, measured in (times or {}).items():
            found.append(self._head(name) | self._numbers(measured))

    def _head(self, name: str) -> dict[str, Any]:
        config = self.config
        train = config.train
        return {
            "provider": name, "encoder": config.model.encoder, "width": config.model.width,
            "method": config.method.name, "levels": getattr(config.method, "levels", None), "batch": self.plan.global_batch,
            "processes": self.world.world_size, "precision": self.precision, "device": self.world.device.type,
            "switches": {k: getattr(train, k) for k in SWITCHES if hasattr(train, k)},
        }  # fmt: skip

    def _numbers(self, measured: Measured) -> dict[str, Any]:
        ms = statistics.median(measured.ms)
        rate = self.flop / (ms / 1e3)
        sheet = next((v for k, v in DATA_SHEET.items() if k in self.ceilings.source), None)
        cuts = statistics.quantiles(measured.ms, n=5) if len(measured.ms) > 1 else [ms] * 4
        return {
            "status": "ok", "ms": ms, "ms_20": cuts[0], "ms_80": cuts[3], "best_ms": min(measured.ms),
            "images_per_s": 1e3 * self.plan.global_batch / ms, "tflop": self.flop / 1e12, "floor_ms": self.floor_ms,
            "share_of_roofline": self.floor_ms / ms, "share_of_product_ceiling": rate / self.ceilings.flop_per_s,
            "mfu": rate / sheet if sheet and self.precision == "bf16" else None,
            "peak_gib": measured.peak_gib, "reserved_gib": measured.reserved_gib, "ceilings": self.ceilings.source,
        }  # fmt: skip


#: Fields of TrainConfig that change how a step runs, not what it computes.
SWITCHES = ("cuda_graph", "compile", "checkpoint_activations")


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


def line(row: dict[str, Any]) -> str:
    """One printed line of a row of `measure` or of the parts."""
    head = f"{row['provider']:<12} {row.get('part') or row['method']:<16} {row['encoder']:<10} B={row['batch']:<5}"
    if row["status"] != "ok":
        return f"{head} {row['status']}"
    times = (
        f"{row['ms']:10.2f} ms (floor {row['floor_ms']:.2f}, {100 * row['share_of_roofline']:.1f} % of the roofline)"
    )
    if "images_per_s" not in row:
        return f"{head} {times}"
    return f"{head} {times} {row['images_per_s']:9.1f} images/s, {row['peak_gib']:.2f} GiB"


def compare(old: list[dict[str, Any]], new: list[dict[str, Any]], margin: float) -> list[str]:
    """Where `new` is slower than `old` by more than `margin` (a share), one line each.

    On a GPU best times are compared; on a CPU, where only ratios within one run mean anything, the speed of ours
    relative to the eager baseline.

    Raises:
        ConfigError: the two have no row in common.
    """
    before, after = _indexed(old), _indexed(new)
    common = [key for key in after if key in before]
    lines, compared = [], 0
    for key in common:
        row = dict(zip(IDENTITY, key))
        if row["device"] == "cpu":
            eager = ("eager", *key[1:])
            if row["provider"] != "ours" or not (eager in before and eager in after):
                continue
            was, now = (found[key] / found[eager] for found in (before, after))
        else:
            was, now = before[key], after[key]
        compared += 1
        if now > was * (1 + margin):
            what = ", ".join(f"{v}" for v in key)
            lines.append(f"{what}: {now:.4g} after {was:.4g}, {100 * (now / was - 1):.1f} % slower")
    if not compared:
        raise ConfigError("the record to compare with has no row of the same provider, network, batch and device")
    return lines


def _indexed(rows: list[dict[str, Any]]) -> dict[tuple, float]:
    return {tuple(row.get(k) for k in IDENTITY): row["best_ms"] for row in rows if row["status"] == "ok"}
