"""Candidates take turns; rows hold medians and quartiles; a CUDA event is a moment whose difference is seconds."""

import time

import pytest
import torch

from rcmstr_fast import timer
from rcmstr_fast.timer import Moment, Times, alternate, measure, quartiles

CPU = torch.device("cpu")


def test_candidates_take_turns_after_their_warm_up():
    calls = []
    found = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, rounds=2, warm_up=1)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert {name: len(times.ms) for name, times in found.items()} == {"a": 2, "b": 2}
    assert all(len(times.processor_ms) == 2 and times.peak_gib == 0 for times in found.values())


def test_what_sleeps_takes_its_time_but_no_processor():
    times = measure(lambda: time.sleep(0.02), CPU, rounds=2, warm_up=0)
    assert times.best >= 20 and min(times.processor_ms) < times.best


def test_rows_are_medians_and_quartiles():
    row = Times((4.0, 1.0, 3.0, 2.0, 5.0)).row()
    assert row == {"ms": 3.0, "ms_25": 2.0, "ms_75": 4.0, "best_ms": 1.0, "rounds": 5}
    assert quartiles([7.0]) == [7.0] * 3 and Times((7.0,)).row()["ms_75"] == 7.0


class FakeEvent:
    """An event whose time is the number of events before it, in hundreds of ms."""

    made = 0
    waited = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        FakeEvent.made += 1
        self.at = 100.0 * FakeEvent.made

    def synchronize(self):
        FakeEvent.waited += 1

    def elapsed_time(self, later):
        return later.at - self.at


def test_moments_are_events_that_wait_when_their_difference_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    first, last = Moment(), Moment()
    assert FakeEvent.waited == 0
    assert last - first == pytest.approx(0.1) and FakeEvent.waited == 1


def test_a_gpu_is_timed_by_events_and_kept_busy(monkeypatch):
    order = []
    for name in (
        "synchronize",
        "memory_allocated",
        "reset_peak_memory_stats",
        "max_memory_allocated",
        "max_memory_reserved",
    ):
        monkeypatch.setattr(
            torch.cuda, name, lambda *_, name=name: {"max_memory_allocated": 2 << 30}.get(name, 1 << 30)
        )
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(timer, "cooler", lambda device: lambda: order.append("cold"))
    times = measure(lambda: order.append("run"), torch.device("cuda"), rounds=2, warm_up=1, cold=True)
    assert order == ["run", "cold", "run", "cold", "run"]
    assert times.ms == pytest.approx((100.0, 100.0)) and times.processor_ms == ()
    assert (times.before_gib, times.peak_gib, times.reserved_gib) == (1.0, 2.0, 1.0)
