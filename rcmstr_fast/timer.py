"""One timer for everything that is measured.

Candidates take turns, call by call, so that a busy moment of the machine meets all of them; a result is the median of
its calls with quantiles beside it. On a CPU a call ends when it returns. On a GPU it is timed by two CUDA events, so
that nothing is waited for between calls.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], Any]
#: Bytes that are written before a cold call: more than the second-level cache of any GPU.
_FLUSHED = 256 << 20
#: Cycles for which a GPU is kept busy before a cold call, so that its launches are queued before it begins (1 ms).
_BUSY = 2_000_000


@dataclass(frozen=True)
class Times:
    """The timed calls of one candidate.

    Attributes:
        ms: of each call, in the order in which they were made.
        processor_ms: processor time of each call, over all threads of this process; empty on a GPU.
        before_gib: device memory that was allocated before the first call; 0 on a CPU.
        peak_gib: most device memory allocated while the candidates were timed; 0 on a CPU.
        reserved_gib: most memory that torch's allocator took from the device meanwhile; 0 on a CPU.
    """

    ms: tuple[float, ...]
    processor_ms: tuple[float, ...] = ()
    before_gib: float = 0.0
    peak_gib: float = 0.0
    reserved_gib: float = 0.0

    @property
    def median(self) -> float:
        """Median of `ms`."""
        return statistics.median(self.ms)

    @property
    def best(self) -> float:
        """Shortest of `ms`."""
        return min(self.ms)

    def row(self) -> dict[str, Any]:
        """The fields of a record: median, quartiles and shortest in ms, and the number of calls."""
        first, _, third = quartiles(self.ms)
        return {"ms": self.median, "ms_25": first, "ms_75": third, "best_ms": self.best, "rounds": len(self.ms)}


def quartiles(samples: tuple[float, ...] | list[float]) -> list[float]:
    """The three quartiles of one or more samples, between the smallest and the largest of them."""
    if len(samples) == 1:
        return [samples[0]] * 3
    return statistics.quantiles(samples, n=4, method="inclusive")


def alternate(
    runs: Mapping[str, Run], device: torch.device, *, rounds: int, warm_up: int | None = None, cold: bool = False
) -> dict[str, Times]:
    """Time several candidates in turn.

    Args:
        runs: name -> one call of the candidate; what it returns is dropped.
        device: where the calls work. Calls that wait for a GPU themselves are timed with the device `cpu`.
        rounds: timed calls of each, 1 or more.
        warm_up: calls of each before; None: 3 on a GPU, 1 on a CPU.
        cold: on a GPU, empty its cache before each call and keep it busy until the call's launches are queued; the
            launches of a call with hundreds of kernels need `captured` to be hidden. On a CPU it changes nothing.
    """
    cuda = device.type == "cuda"
    for run in runs.values():
        for _ in range((3 if cuda else 1) if warm_up is None else warm_up):
            run()
    turns = itertools.chain.from_iterable(runs.items() for _ in range(rounds))
    return _by_events(runs, turns, device, cold) if cuda else _by_clock(runs, turns)


def measure(run: Run, device: torch.device, *, rounds: int, warm_up: int | None = None, cold: bool = False) -> Times:
    """Time one candidate alone; the arguments are those of `alternate`."""
    return alternate({"": run}, device, rounds=rounds, warm_up=warm_up, cold=cold)[""]


def _by_clock(runs: Mapping[str, Run], turns: Any) -> dict[str, Times]:
    wall: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in turns:
        begun, used = time.perf_counter(), time.process_time()
        run()
        wall[name].append(1e3 * (time.perf_counter() - begun))
        processor[name].append(1e3 * (time.process_time() - used))
    return {name: Times(tuple(wall[name]), tuple(processor[name])) for name in runs}


def _by_events(runs: Mapping[str, Run], turns: Any, device: torch.device, cold: bool) -> dict[str, Times]:
    make_cold = cooler(device) if cold else None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    moments: dict[str, list[tuple[Moment, Moment]]] = {name: [] for name in runs}
    for name, run in turns:
        if make_cold is not None:
            make_cold()
        first = Moment()
        run()
        moments[name].append((first, Moment()))
    torch.cuda.synchronize(device)
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    memory = [number / 2**30 for number in (before, peak, reserved)]
    return {
        name: Times(tuple(1e3 * (last - first) for first, last in found), (), *memory)
        for name, found in moments.items()
    }


class Moment:
    """A CUDA event, recorded where it is made; the difference of two is the GPU's time between them in seconds.

    As the timer of pytest-benchmark (`--benchmark-timer=rcmstr_fast.timer.Moment`) it synchronises when the
    difference is taken, behind the call and not inside of it.
    """

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def cooler(device: torch.device) -> Callable[[], None]:
    """A call that empties the cache of a GPU and keeps it busy for a millisecond; on a CPU it does nothing."""
    if device.type != "cuda":
        return lambda: None
    flushed = torch.empty(_FLUSHED, dtype=torch.int8, device=device)

    def call() -> None:
        flushed.zero_()
        torch.cuda._sleep(_BUSY)

    return call


def captured(run: Run) -> tuple[Run, bool]:
    """A CUDA graph's replay of `run`, so that nothing but the GPU is timed; and whether it could be recorded.

    Where it cannot (it waits for the device, or allocates in a way that a graph does not take), `run` itself is returned.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True
