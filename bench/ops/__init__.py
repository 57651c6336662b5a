"""The operations against their peers: entries (an operation at a shape with its providers), and their rows.

`rows` measures with the package's own timer, for `rcmstr bench ops` and for GPUs whose Python has no pytest-benchmark;
`pytest bench --benchmark-only` measures the same entries. A provider whose results are off is reported as FAIL and not
timed; one that runs out of memory or raises says so.
"""

from collections.abc import Iterable, Iterator

import torch

from bench.ops.entry import BOTH, Disagreement, Entry
from bench.ops.subjects import Subject, subjects
from rcmstr_fast import timer
from rcmstr_fast.measure.records import Row
from rcmstr_fast.train.utilisation import peak

__all__ = ["chosen", "line", "rows"]


def chosen(size: str, only: Iterable[str] = ()) -> list[Subject]:
    """The subjects of a size whose name contains one of `only`, or all of them."""
    texts = tuple(only)
    return [s for s in subjects(size) if not texts or any(text in s.name for text in texts)]


def rows(subject: Subject, device: str, rounds: int) -> Iterator[Row]:
    """Check the providers of a subject, then time them mode by mode: in turn on a CPU, alone on a GPU."""
    entry = subject.build()
    expected, errors = entry.expected(), {}
    for name in subject.providers:
        try:
            errors[name] = entry.check(name, expected)
        except Exception as error:  # a peer's failure is a result, not the end of the run
            yield entry.head(name) | failure(error)
    for mode in subject.modes:
        together = [list(errors)] if device == "cpu" else [[name] for name in errors]
        for names in together:
            yield from _timed(entry, names, mode, errors, device, rounds)


def _timed(
    entry: Entry, names: list[str], mode: str, errors: dict[str, list[float]], device: str, rounds: int
) -> Iterator[Row]:
    runs = {name: call(entry, name, mode) for name in names}
    try:
        times = timer.alternate(runs, torch.device(device), rounds=rounds, cold=True)
    except Exception as error:
        yield from (entry.head(name) | {"mode": mode} | failure(error) for name in names)
        return
    for name, found in times.items():
        row = entry.head(name) | {"mode": mode, "status": "ok", "errors": errors[name]} | found.row()
        yield row | extras(entry, mode, device, found.median, 1024 * (found.peak_gib - found.before_gib))


def call(entry: Entry, provider: str, mode: str) -> timer.Run:
    """One call of a provider."""
    run, gradient = entry.providers[provider], mode == BOTH
    return lambda: run(gradient)


def extras(entry: Entry, mode: str, device: str, ms: float, peak_mib: float) -> Row:
    """What a GPU's row says beyond its times: the peak memory, and the share of the known rate of its products."""
    if device == "cpu":
        return {}
    known = peak(torch.cuda.get_device_name())
    if known is None or not entry.flops or mode != BOTH:
        return {"peak_mib": peak_mib}
    return {"peak_mib": peak_mib, "share_of_floor": 1e3 * entry.flops / known.reached / ms}


def failure(error: Exception) -> Row:
    """The status of a provider that raised."""
    if isinstance(error, Disagreement):
        return {"status": "FAIL", "errors": error.errors}
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return {"status": "out of memory"}
    if isinstance(error, LookupError):
        return {"status": str(error)}
    return {"status": f"{type(error).__name__}: {str(error)[:200]}"}


def line(row: Row) -> str:
    """One printed line of a result."""
    head = f"{row['operation']:<20} {row['shape']:<38} {row['provider']:<20}"
    if row["status"] != "ok":
        return f"{head} {row['status']} {row.get('errors', '')}"
    extra = "".join(f" {key} {row[key]:.3g}" for key in ("peak_mib", "share_of_floor") if key in row)
    return f"{head} {row['mode']:<21} {row['ms']:9.3f} ms [{row['ms_25']:.3f}, {row['ms_75']:.3f}]{extra}"
