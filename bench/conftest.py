"""`pytest bench --benchmark-only`: operations, masked pass, data path and step as benchmarks, in groups of providers.

A provider is checked before it is timed. Without `--benchmark-only`, as in the test suite, everything runs once at the
smallest size. On a GPU the clock is a CUDA event. `--benchmark-json` leaves a record (`rcmstr_fast.measure.records`)
from which the pages are made; providers that failed are in its `rows`.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bench.ops import failure
from bench.ops.entry import Entry
from bench.ops.subjects import SIZES, Subject, subjects
from rcmstr_fast import timer
from rcmstr_fast.measure import machine
from rcmstr_fast.measure.records import Row

_ROWS: pytest.StashKey[list[Row]] = pytest.StashKey()
#: size -> timed rounds of a provider
ROUNDS = {"tiny": 2, "cpu": 10, "gpu": 20}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--bench-size`."""
    about = "sizes of pytest bench; default: gpu or cpu with --benchmark-only, else tiny"
    parser.getgroup("bench").addoption("--bench-size", choices=SIZES, help=about)


def pytest_configure(config: pytest.Config) -> None:
    """Take CUDA events as the clock where a GPU is measured; show what says most."""
    config.stash[_ROWS] = []
    if size_of(config) == "gpu":
        config.option.benchmark_timer = f"{timer.Moment.__module__}.{timer.Moment.__name__}"
    config.option.benchmark_columns = config.option.benchmark_columns or ["min", "median", "iqr", "rounds"]


def size_of(config: pytest.Config) -> str:
    """The size that is measured, of SIZES."""
    if config.getoption("bench_size"):
        return config.getoption("bench_size")
    if not config.getoption("benchmark_only"):
        return "tiny"
    return "gpu" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every provider and mode of every subject of the size."""
    if "subject" in metafunc.fixturenames:
        cases = [
            pytest.param(subject.name, provider, mode, id=f"{subject.name}-{provider}-{mode}")
            for subject in subjects(size_of(metafunc.config))
            for provider in subject.providers
            for mode in subject.modes
        ]
        metafunc.parametrize(("subject", "provider", "mode"), cases)


@functools.cache
def _machine() -> dict[str, Any]:
    return machine.describe()


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """The one description of the machine; no host names."""
    return _machine()


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    """The commit of the checkout."""
    return machine.commit_of(_machine())


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict[str, Any]) -> None:
    """What could not be timed goes into the record, too."""
    output_json["rows"] = config.stash[_ROWS]


class Bench:
    """What the benchmarks share: the size, one built entry at a time, and the record of failures."""

    def __init__(self, config: pytest.Config) -> None:
        self.size = size_of(config)
        self.device = torch.device("cuda" if self.size == "gpu" else "cpu")
        self.rounds = ROUNDS[self.size]
        self._rows = config.stash[_ROWS]
        self._subjects: dict[str, Subject] = {subject.name: subject for subject in subjects(self.size)}
        self._built: tuple[str, Entry, list[torch.Tensor]] | None = None
        self._errors: dict[tuple[str, str], list[float]] = {}

    def entry(self, name: str) -> Entry:
        """The entry of a subject; the one before is forgotten."""
        if self._built is None or self._built[0] != name:
            self._built = None
            entry = self._subjects[name].build()
            self._built = name, entry, entry.expected()
        return self._built[1]

    def check(self, name: str, provider: str) -> list[float]:
        """Relative errors of a provider, which are computed once for all its modes; raises where they are too large."""
        entry = self.entry(name)
        assert self._built is not None
        if (name, provider) not in self._errors:
            self._errors[name, provider] = entry.check(provider, self._built[2])
        return self._errors[name, provider]

    def time(self, benchmark: Any, run: Callable[[], Any], rounds: int | None = None) -> float:
        """Time calls of `run`; most device memory that was allocated beyond what was there, in MiB (0 on a CPU)."""
        cuda = self.device.type == "cuda"
        rounds = rounds or self.rounds
        benchmark.pedantic(
            run,
            rounds=1 if benchmark.disabled else rounds,
            warmup_rounds=3 if cuda else 1,
            setup=timer.cooler(self.device) if cuda else None,
        )
        if not cuda:
            return 0.0
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def fail(self, row: Row) -> None:
        """Record a provider that cannot be timed: ours fails the benchmark, a peer is skipped."""
        self._rows.append(row)
        what = f"{row['provider']}: {row['status']} {row.get('errors', '')}"
        (pytest.fail if row["provider"] in ("ours", "sparse", "pillow") else pytest.skip)(what)

    @contextmanager
    def failures(self, head: Row) -> Iterator[None]:
        """Make a failing provider a row."""
        try:
            yield
        except Exception as error:  # a peer's failure is a result, not the end of the run
            self.fail(head | failure(error))


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Bench:
    """What the benchmarks share."""
    torch.set_float32_matmul_precision("high")  # TF32 for the baselines, which they would use in training
    return Bench(request.config)


def median_ms(benchmark: Any) -> float | None:
    """Median of a benchmark that was timed; None where timing is switched off."""
    return 1e3 * benchmark.stats.stats.median if benchmark.stats else None
