"""Whole training steps against plain PyTorch, from the same weights, after their losses agree."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import step as bench_step
from bench.conftest import Bench, median_ms
from bench.gpu.recipes import configured, recipe, tiny
from bench.gpu.setting import Setting
from rcmstr_fast.measure.ceilings import measure_ceilings
from rcmstr_fast.measure.running import exact_or_fast, precision_of, release
from rcmstr_fast.measure.step import Contest, stepping
from rcmstr_fast.train.distributed import World

#: size -> networks, batch, providers
SIZES: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "tiny": (("resnet29", "vit_tiny"), 4, ("ours", "eager")),
    "cpu": (("resnet29", "vit_tiny"), 32, ("ours", "eager")),
    "gpu": (("resnet29", "vit_small"), 512, ("ours", "eager", "compile")),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every provider of every network of the size."""
    from bench.conftest import size_of

    encoders, _, providers = SIZES[size_of(metafunc.config)]
    metafunc.parametrize("encoder", encoders, scope="module")
    metafunc.parametrize("provider", providers)


@pytest.fixture(scope="module")
def contest(encoder: str, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contest]:
    """The configuration of a network with its data, checks and floor."""
    batch, world = SIZES[bench.size][1], World(bench.device)
    setting = Setting(Path(), bench.device.type)
    values = recipe(setting, encoder, batch=batch)
    if bench.size != "gpu":
        values |= {"train.precision": "fp32", "model.width": 0.25, "model.depth": 4, "method.queue_size": 4096}
    config = configured(values | (tiny() if bench.size == "tiny" else {}))
    ceilings = measure_ceilings(bench.device, precision_of(config, bench.device))
    with exact_or_fast(config, bench.device):
        yield Contest(config, world, tmp_path_factory.mktemp("step") / "run", ceilings)
    release(bench.device)


def test_step(contest: Contest, encoder: str, provider: str, bench: Bench, benchmark: Any) -> None:
    """One provider of a step."""
    benchmark.group = f"step, {encoder}, B = {contest.plan.global_batch}"
    factories = bench_step.factories([provider] if provider != "ours" else [])
    made = contest.ready(provider, factories.get(provider))
    if made is None:
        bench.fail(contest.rows[-1])
        return
    with bench.failures(contest.head(provider)):
        peak_mib = bench.time(benchmark, stepping(made, contest.batches), rounds=5 if bench.size == "cpu" else None)
    ms = median_ms(benchmark)
    if ms:
        memory = {"peak_gib": peak_mib / 1024, "reserved_gib": 0.0}
        benchmark.extra_info |= contest.head(provider) | memory | contest.numbers(ms)
