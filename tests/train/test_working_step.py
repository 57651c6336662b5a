"""Steps in bfloat16 with shared copies of the weights: recorded equals direct, and direct equals separate casts."""

import pytest

from rcmstr_fast.models.conv_norm import WorkingWeights
from rcmstr_fast.train import step
from tests.train.test_captured import assert_equal_state, make_trainer, take, tape

OPTIONS = {"name": "rcmstr", "accumulate": 2, "batch": 4}


@pytest.fixture(autouse=True)
def plain_layers_in_bfloat16(monkeypatch):
    monkeypatch.setenv("RCMSTR_FAST_BACKEND", "reference")
    monkeypatch.setattr(step, "use_bf16", lambda *_: True)


def test_recorded_steps_follow_the_weights(tmp_path):
    direct, replayed = (make_trainer(tmp_path / name, **OPTIONS) for name in ("direct", "replayed"))
    recorder = tape(replayed)
    assert take(direct, 4, monitor_every=9) == take(replayed, 4, monitor_every=9)
    assert "replay" in recorder.calls
    assert_equal_state(direct, replayed)


def test_steps_equal_those_with_separate_casts(tmp_path, monkeypatch):
    shared = make_trainer(tmp_path / "shared", **OPTIONS)
    take(shared, 2)
    assert shared.take.weights._layers
    monkeypatch.setattr(step, "WorkingWeights", lambda module, dtype: WorkingWeights(module, None))
    separate = make_trainer(tmp_path / "separate", **OPTIONS)
    take(separate, 2)
    assert not separate.take.weights._layers
    assert_equal_state(shared, separate)
