"""What candidates are timed on: whether the data of a fed step come in time, on a clock of the test's own."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.data import loader
from rcmstr_fast.train import trial


@pytest.mark.parametrize(("data", "says"), [(0.001, "steps wait 0.1% of their time for data"), (0.1, "")])
def test_whether_steps_wait_for_their_data(monkeypatch, data, says):
    now, taken = [0.0], []

    def passes(seconds):
        now[0] += seconds

    def batches():
        passes(50.0)  # the start of the workers is not counted
        while True:
            passes(data)
            yield [len(taken)]

    def step(batch):
        taken.append(batch)
        passes(1.0)

    monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    feed = trial.Feed(PretrainConfig(), torch.device("cpu"), lambda: step, lambda step: nn.Identity(), batches)
    made = trial.Trial(feed)
    assert made.keeps_up() == ""  # nothing is known before a fed step
    before = len(taken)
    made.run(loader.WORKERS, 1)()
    assert len(taken) == before + trial._FED and made.keeps_up() == says
