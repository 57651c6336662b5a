"""Candidates of a choice timed in turn until the fastest is known, within a budget of seconds."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from rcmstr_fast.timer import Run, Times, measure
from rcmstr_fast.tuning.choices import Value

#: Timed calls of a candidate: at least so many before anything is decided, and at most.
LEAST, MOST = 5, 11
#: A candidate leaves the prior behind only where its median is below this share of the prior's.
WORTH = 0.97
#: A candidate this many times slower than the fastest after its first call is not called again.
HOPELESS = 2.0
#: Calls of a candidate before it is timed.
_WARM_UP = {"cpu": 1, "cuda": 3}


@dataclass
class Outcome:
    """What came of a choice.

    Attributes:
        name: of the choice.
        prior: what would have run.
        chosen: what runs.
        times: candidate, as shown -> its timed calls.
        failed: candidate, as shown -> why it could not be timed.
        why: in a few words.
        gain: median of the prior over the median of the chosen; 1 where nothing was timed.
        seconds: that it took.
        about: what is chosen.
        shown: the chosen candidate in words.
    """

    name: str
    prior: Value
    chosen: Value
    times: dict[str, Times] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    why: str = ""
    gain: float = 1.0
    seconds: float = 0.0
    about: str = ""
    shown: str = ""

    def row(self) -> dict[str, Any]:
        """Plain values for a record."""
        times = {name: found.row() for name, found in self.times.items()}
        return {
            "name": self.name,
            "about": self.about,
            "prior": self.prior,
            "chosen": self.chosen,
            "shown": self.shown,
            "times": times,
            "failed": self.failed,
            "why": self.why,
            "gain": self.gain,
            "seconds": self.seconds,
        }


def contest(
    name: str,
    prior: Value,
    candidates: Mapping[Value, Callable[[], Run]],
    device: torch.device,
    seconds: float,
    *,
    show: Callable[[Value], str] = str,
    warm_up: int | None = None,
    settled: Callable[[], str] = str,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Time the candidates in turn and take the fastest.

    The prior stays unless another one is faster by more than the noise (their quartiles do not overlap). A candidate
    that raises (it does not compile, the device's memory is too small) leaves the contest with its reason.

    Args:
        name: of the choice.
        prior: what would run; one of the candidates.
        candidates: value -> makes one call of what is timed; the prior is timed first.
        device: where the calls work.
        seconds: no call begins that would end later, taking as long as the longest so far. The prior is timed in any
            case.
        show: a candidate in words.
        warm_up: calls of a candidate before it is timed; None: 1 on a CPU, 3 on a GPU.
        settled: asked after the prior's first timed call: why no other candidate can gain anything; empty: one may.
        clock: seconds.
    """
    began, out = clock(), Outcome(name, prior, prior)
    runs: dict[Value, Run] = {}
    samples: dict[Value, list[float]] = {}
    longest = 0.0  # seconds of a call
    before = _WARM_UP[device.type] if warm_up is None else warm_up

    def turn(value: Value, warm_up: int) -> bool:
        """Time one call of a candidate and say so; False where there is no time for it."""
        nonlocal longest
        started = clock()
        if samples and started - began + (1 + warm_up) * longest > seconds:
            return False
        try:
            if value not in runs:
                runs[value] = candidates[value]()
            found = measure(runs[value], device, rounds=1, warm_up=warm_up)
            samples.setdefault(value, []).extend(found.ms)
        except Exception as error:  # whatever a candidate does, the others go on
            out.failed[show(value)] = reason(error)
            runs.pop(value, None)
            samples.pop(value, None)
            release(device)
        longest = max(longest, (clock() - started) / (1 + warm_up))
        return True

    order = sorted(candidates, key=lambda value: value != prior)
    turn(prior, before)
    nothing_to_gain = settled() if samples else ""
    late = [] if nothing_to_gain else [value for value in order[1:] if not turn(value, before)]
    for count in range(1, MOST):
        alive = [value for value in samples if samples[value][0] <= HOPELESS * min(s[0] for s in samples.values())]
        if len(alive) < 2 or (count >= LEAST and _decided(samples, alive)):
            break
        if not all(turn(value, 0) for value in alive):
            break
    out.times = {show(value): Times(tuple(ms)) for value, ms in samples.items()}
    out.failed |= {show(value): "no time was left" for value in late}
    _choose(out, samples, seconds)
    out.why = nothing_to_gain or out.why
    out.seconds, out.shown = clock() - began, show(out.chosen)
    return out


def _choose(out: Outcome, samples: Mapping[Value, list[float]], seconds: float) -> None:
    """Fill in what was chosen, why and the gain."""
    if not samples:
        out.why = "no candidate could be timed"
        return
    times = {value: Times(tuple(ms)) for value, ms in samples.items()}
    fastest = min(times, key=lambda value: times[value].median)
    if out.prior not in times:
        out.chosen, out.why = fastest, "the prior failed"
        return
    gain = times[out.prior].median / times[fastest].median
    mine, theirs = times[fastest].row(), times[out.prior].row()
    enough = len(times[fastest].ms) >= LEAST
    hopeless = theirs["ms"] > HOPELESS * mine["ms"]
    if fastest == out.prior:
        out.why = "the fastest"
    elif hopeless or (enough and gain * WORTH > 1 and mine["ms_75"] < theirs["ms_25"]):
        out.chosen, out.gain, out.why = fastest, gain, "faster than the prior"
    else:
        out.why = "nothing is faster beyond the noise" if enough else f"not decided in {seconds:.0f} s"


def _decided(samples: Mapping[Value, list[float]], alive: list[Value]) -> bool:
    """Whether the calls of the fastest do not overlap with those of any other (between quartiles)."""
    rows = {value: Times(tuple(samples[value])).row() for value in alive}
    fastest = min(rows, key=lambda value: rows[value]["ms"])
    return all(rows[fastest]["ms_75"] < row["ms_25"] for value, row in rows.items() if value != fastest)


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())[:200]
    return "out of memory" if isinstance(error, torch.cuda.OutOfMemoryError) else f"{type(error).__name__}: {text}"


def release(device: torch.device) -> None:
    """Give the memory of a failed candidate back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
