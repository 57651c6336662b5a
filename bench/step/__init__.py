"""The whole step beside its baselines: providers, the parts of a step, its bare products."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from bench.report import recipes
from bench.step import parts, products
from bench.step.baseline import lacks
from bench.step.providers import MODES, build, factory
from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.measure.ceilings import measure_ceilings
from rcmstr_fast.measure.records import Row
from rcmstr_fast.measure.running import (
    OurStep,
    exact_or_fast,
    initial_state,
    inputs,
    made_up_batches,
    precision_of,
    release,
    with_batch,
)
from rcmstr_fast.measure.step import Factory, measure
from rcmstr_fast.train.distributed import World

__all__ = ["factories", "method_rows", "part_rows", "product_rows"]


def factories(names: list[str]) -> dict[str, Factory]:
    """The baselines of the given names.

    Raises:
        ConfigError: an unknown name.
    """
    for name in names:
        if name not in MODES:
            raise ConfigError(f"providers must be of ours, {', '.join(MODES)}, got {name!r}")
    return {name: factory(name) for name in names}


def method_rows(names: list[str], world: World, batch: int, precision: str, repetitions: int) -> Iterator[list[Row]]:
    """Rows of each recipe, ours and plain PyTorch in turn; `recipe` names it, `by_hand` says which baseline it met.

    Args:
        names: recipes.
        world: a single process.
        batch: images a step; 0: the recipe's.
        precision: of all: auto, fp32 or bf16.
        repetitions: timed steps of each.
    """
    ceilings = None
    for name in names:
        config = recipes.load(name)
        config = replace(config, train=replace(config.train, precision=precision))
        config = with_batch(config, batch) if batch else config
        ceilings = ceilings or measure_ceilings(world.device, precision_of(config, world.device))
        found = measure(config, world, factories(["eager"]), repetitions, ceilings)
        yield [row | {"recipe": name, "by_hand": not lacks(config)} for row in found]


def part_rows(config: PretrainConfig, names: list[str], world: World, repetitions: int) -> list[Row]:
    """Every part of ours and of the named baselines, at the batch of the configuration.

    Args:
        config: resolved, without accumulation.
        names: of `MODES`; compiled ones are left out, as what is compiled together has no parts.
        world: a single process.
        repetitions: timed calls.
    Raises:
        ConfigError: several processes.
    """
    if world.world_size > 1:
        raise ConfigError(f"parts are measured on one process, got {world.world_size}")
    precision = precision_of(config, world.device)
    ceilings = measure_ceilings(world.device, precision)
    with tempfile.TemporaryDirectory() as folder, exact_or_fast(config, world.device):
        ours = OurStep(config, world, Path(folder) / "run")
        batches, state = made_up_batches(config, ours.plan, world, 1)[0], initial_state(config, world)
        ours.step(batches)  # the part `update` needs gradients
        sides: parts.Sides = parts.OurSides(ours, inputs(batches[0]))
        found = parts.rows("ours", sides, ceilings, precision, repetitions, graphs=True)
        del ours, sides
        for name in (name for name in names if not MODES[name]):
            release(world.device)
            baseline = build(name, config, world.device, state)
            baseline.step(inputs(batches[0]))
            sides = parts.BaselineSides(baseline, inputs(batches[0]))
            found += parts.rows(name, sides, ceilings, precision, repetitions, graphs=False)
            del baseline, sides
    release(world.device)
    return found


def product_rows(config: PretrainConfig, images: int, precision: str, device: torch.device) -> list[Row]:
    """The encoder's products alone; `bench.step.products.rows`."""
    return products.rows(config, images, precision, device.type, 10 if device.type == "cuda" else 2)
