"""The stages of the data path, each against its peers; rates are pictures of one process."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from bench import data
from bench.conftest import Bench, median_ms
from rcmstr_fast.config import PretrainConfig, resolve
from rcmstr_fast.measure.pipeline import Sample, sample

CASES = [(stage, provider) for stage, names in data.PROVIDERS.items() for provider in names]


@pytest.fixture(scope="module")
def words(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sample]:
    """Records of rendered words."""
    pytest.importorskip("fontTools", reason="fontTools, which words are rendered with, is not installed")
    from rcmstr_fast.data.synth import SynthConfig, render_lmdb

    count = {"tiny": 8, "cpu": 2048, "gpu": 8192}[bench.size]
    folder = tmp_path_factory.mktemp("data") / "words"
    made = SynthConfig(out=str(folder), count=count, samples=0)
    made.processes = 1 if bench.size == "tiny" else 0
    config = PretrainConfig()
    config.data.roots = [str(render_lmdb(made))]
    config.train.global_batch_size, config.train.device = min(count, 64), bench.device.type
    yield sample(resolve(config))


@pytest.mark.parametrize(("stage", "provider"), CASES)
def test_stage(stage: str, provider: str, words: Sample, bench: Bench, benchmark: Any) -> None:
    """One provider of a stage."""
    head = {"group": "data", "stage": stage, "provider": provider}
    benchmark.group = f"data path, {stage}"
    with ExitStack() as stack:
        run = data.calls(stage, words, stack).get(provider, "not installed here")
        if isinstance(run, str):
            bench.fail(head | {"status": run})
        else:
            count, rounds = run(), bench.rounds
            used = time.process_time()
            bench.time(benchmark, run)
            used = time.process_time() - used
            ms = median_ms(benchmark)
            if ms:
                rates = {"images_per_s": 1e3 * count / ms, "per_core": count * (rounds + 1) / max(used, 1e-6)}
                benchmark.extra_info |= head | rates
