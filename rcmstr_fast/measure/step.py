"""What `rcmstr bench step` measures: whole training steps on made-up views, against their floor and other providers.

A provider is built from the same weights, its loss of the first batch is compared with ours, and only then is it timed.
On a CPU providers take turns, step by step, so that a busy machine meets all of them; on a GPU each is alone, for its
peak memory.
"""

import functools
import itertools
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rcmstr_fast import timer
from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.measure.ceilings import Ceilings, measure_ceilings
from rcmstr_fast.measure.records import Row
from rcmstr_fast.measure.running import (
    OurStep,
    exact_or_fast,
    first_loss,
    initial_state,
    made_up_batches,
    made_up_plan,
    precision_of,
    release,
)
from rcmstr_fast.methods.costs import step_works
from rcmstr_fast.methods.levels import RelationalSettings
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.utilisation import peak

#: Largest relative difference of the first loss from ours, by precision.
AGREEMENT = {"fp32": 1e-4, "bf16": 2e-2}
#: The keys of a row by which two records are compared.
IDENTITY = ("provider", "encoder", "width", "method", "batch", "processes", "precision", "device")
#: Fields of TrainConfig that change how a step runs, not what it computes.
SWITCHES = ("cuda_graph", "compile", "checkpoint_activations")
#: Steps of different data that a provider goes through again and again.
_BATCHES = 2


class StepProvider(Protocol):
    """One way to run a training step; a step's data is the list of its micro-batches.

    One that is not ours also has `first_loss(batch) -> float`, by which it is checked: the loss of a micro-batch with the
    weights it was made with.
    """

    def step(self, batches: list[Any]) -> None:
        """One whole step; does not wait for the device."""
        ...


#: (resolved config, device, state dict of the method on the CPU) -> provider
Factory = Callable[[PretrainConfig, torch.device, dict[str, Tensor]], StepProvider]


def measure(
    config: PretrainConfig,
    world: World,
    factories: dict[str, Factory],
    repetitions: int,
    ceilings: Ceilings | None = None,
) -> list[Row]:
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
    ceilings = ceilings or measure_ceilings(world.device, precision_of(config, world.device))
    with ExitStack() as stack:
        stack.enter_context(exact_or_fast(config, world.device))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        contest = Contest(config, world, folder, ceilings)
        contest.enter(factories, repetitions)
        return contest.rows


class Contest:
    """The providers of one configuration: each is built, checked, and then timed.

    Args:
        config: resolved.
        world: this process.
        folder: where a run would be kept; nothing is written.
        ceilings: of the device.

    Attributes:
        rows: what came of the providers so far.
    """

    def __init__(self, config: PretrainConfig, world: World, folder: Path, ceilings: Ceilings) -> None:
        self.config, self.world, self.ceilings, self.folder = config, world, ceilings, folder
        self.precision = precision_of(config, world.device)
        self.plan = made_up_plan(config, world)
        self.batches = made_up_batches(config, self.plan, world, _BATCHES)
        known = isinstance(config.method, RelationalSettings)  # of other methods there is no floor yet
        works = step_works(config, self.plan.local_batch, self.precision) if known else []
        self.flop = sum(w.flop for w in works)
        self.floor_ms = ceilings.ms(works) if known else None
        self.rows: list[Row] = []

    @functools.cached_property
    def expected(self) -> float:
        """Our loss of the first micro-batch, with the initial weights."""
        return first_loss(self.config, self.world, self.batches[0][0])

    @functools.cached_property
    def state(self) -> dict[str, Tensor]:
        """The initial weights and queues of our method, on the CPU, from which every provider is built."""
        return initial_state(self.config, self.world)

    def enter(self, factories: dict[str, Factory], repetitions: int) -> None:
        """Time ours and the others; one that fails or disagrees is reported and not timed."""
        alone, providers = self.world.device.type == "cuda", {}
        for name in ("ours", *factories):
            release(self.world.device)
            made = self.ready(name, factories.get(name))
            if made is None:
                continue
            providers[name] = made
            del made
            if alone:
                self._time(providers, repetitions)
                providers.clear()
        if providers:
            self._time(providers, repetitions)

    def ready(self, name: str, factory: Factory | None) -> StepProvider | None:
        """A provider that may be timed: ours, or one whose loss of the first batch is ours; else None, and a row why.

        Args:
            name: of the provider; `ours` needs no factory.
            factory: of another.
        """
        if factory is None:
            return self._guarded(name, lambda: OurStep(self.config, self.world, self.folder))
        made = self._guarded(name, lambda: factory(self.config, self.world.device, self.state))
        loss = None if made is None else self._guarded(name, lambda: made.first_loss(self.batches[0][0]))
        if loss is None:
            return None
        error = abs(loss - self.expected) / max(abs(self.expected), 1e-12)
        if not error <= AGREEMENT[self.precision]:
            self.rows.append(self.head(name) | {"status": "FAIL", "error": error})
            return None
        return made

    def _guarded(self, name: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except ConfigError:
            raise
        except torch.cuda.OutOfMemoryError:
            self.rows.append(self.head(name) | {"status": "out of memory"})
        except Exception as error:  # a provider's failure is a result, not the end of the run
            if name == "ours":
                raise
            self.rows.append(self.head(name) | {"status": f"{type(error).__name__}: {str(error)[:300]}"})
        return None

    def _time(self, providers: dict[str, StepProvider], repetitions: int) -> None:
        steps = {name: stepping(made, self.batches) for name, made in providers.items()}
        release(self.world.device)  # what only building needed must not count as its memory
        device = self.world.device
        warm_up = 12 if device.type == "cuda" else 2
        times = self._guarded(
            ", ".join(steps), lambda: timer.alternate(steps, device, rounds=repetitions, warm_up=warm_up)
        )
        for name, found in (times or {}).items():
            memory = {"peak_gib": found.peak_gib, "reserved_gib": found.reserved_gib}
            # Unlike the clock, processor time says something on a machine that others work on as well.
            busy = {"best_processor_ms": min(found.processor_ms)} if found.processor_ms else {}
            self.rows.append(self.head(name) | found.row() | busy | memory | self.numbers(found.median))

    def head(self, name: str) -> Row:
        """The names of a provider's row."""
        config = self.config
        return {
            "group": "step",
            "provider": name,
            "encoder": config.model.encoder,
            "width": config.model.width,
            "method": config.method.name,
            "levels": getattr(config.method, "levels", None),
            "batch": self.plan.global_batch,
            "processes": self.world.world_size,
            "precision": self.precision,
            "device": self.world.device.type,
            "switches": {name: getattr(config.train, name) for name in SWITCHES},
        }

    def numbers(self, ms: float) -> Row:
        """What follows from a step of `ms`: images/s; where the floor is known shares of roofline and product rate, and MFU."""
        images = {"status": "ok", "images_per_s": 1e3 * self.plan.global_batch / ms, "ceilings": self.ceilings.source}
        if self.floor_ms is None:
            return images
        rate, known = self.flop / (ms / 1e3), peak(self.ceilings.source)
        return images | {
            "tflop": self.flop / 1e12,
            "floor_ms": self.floor_ms,
            "share_of_roofline": self.floor_ms / ms,
            "share_of_product_ceiling": rate / self.ceilings.flop_per_s,
            "mfu": rate / known.sheet if known and self.precision == "bf16" else None,
        }


def stepping(provider: StepProvider, batches: list[list[Any]]) -> timer.Run:
    """A call that makes the provider's next step, on one batch after the other."""
    coming = itertools.cycle(batches)
    return lambda: provider.step(next(coming))


def line(row: Row) -> str:
    """One printed line of a row of `measure` or of the parts."""
    head = f"{row['provider']:<12} {row.get('part') or row['method']:<16} {row['encoder']:<10} B={row['batch']:<5}"
    if row["status"] != "ok":
        return f"{head} {row['status']}"
    times = f"{row['ms']:10.2f} ms"
    if "floor_ms" in row:
        times += f" (floor {row['floor_ms']:.2f}, {100 * row['share_of_roofline']:.1f} % of the roofline)"
    if "images_per_s" not in row:
        return f"{head} {times}"
    return f"{head} {times} {row['images_per_s']:9.1f} images/s, {row['peak_gib']:.2f} GiB"


def compare(old: list[Row], new: list[Row], margin: float) -> list[str]:
    """Where `new` is slower than `old` by more than `margin` (a share), one line each.

    On a GPU best times are compared; on a CPU, where only ratios within one run mean anything, the speed of ours
    relative to the eager baseline.

    Raises:
        ConfigError: the two have no row in common.
    """
    before, after = _comparable(old), _comparable(new)
    common = [key for key in after if key in before]
    if not common:
        raise ConfigError("the record to compare with has no row of the same provider, network, batch and device")
    lines = []
    for key in common:
        was, now = before[key], after[key]
        if now > was * (1 + margin):
            what = ", ".join(f"{v}" for v in key)
            lines.append(f"{what}: {now:.4g} after {was:.4g}, {100 * (now / was - 1):.1f} % slower")
    return lines


def _comparable(rows: list[Row]) -> dict[tuple, float]:
    """What two records are compared by: best ms on a GPU, ours over eager on a CPU."""
    best = {tuple(row.get(k) for k in IDENTITY): row["best_ms"] for row in rows if row["status"] == "ok"}
    found = {}
    for key, ms in best.items():
        eager = ("eager", *key[1:])
        if key[IDENTITY.index("device")] != "cpu":
            found[key] = ms
        elif key[0] == "ours" and eager in best:
            found[key] = ms / best[eager]
    return found
