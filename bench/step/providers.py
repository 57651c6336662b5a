"""The baselines as providers of `rcmstr_fast.measure.step`: eager, compiled, compiled with max-autotune.

Eager is written out by hand where `baseline` knows the method and its switches; else it is the method in `plain`
PyTorch. Only what is written out by hand is compiled.
"""

from typing import Any

import torch
from torch import Tensor

from bench.step.baseline import Baseline, lacks
from bench.step.plain import PlainStep
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.measure.running import inputs, precision_of
from rcmstr_fast.measure.step import Factory, StepProvider

#: provider -> mode of torch.compile; empty: eager
MODES = {"eager": "", "compile": "default", "compile_max": "max-autotune-no-cudagraphs"}


class BaselineStep:
    """The baseline behind the two methods that the benchmark calls."""

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline

    def first_loss(self, batch: Any) -> float:
        """Loss of a batch; its gradients are forgotten."""
        loss, _ = self.baseline.gradients(inputs(batch))
        self.baseline.optimizer.zero_grad()
        return float(loss)

    def step(self, batches: list[Any]) -> None:
        """One step."""
        self.baseline.step(inputs(batches[0]))


def build(name: str, config: PretrainConfig, device: torch.device, state: dict[str, Tensor]) -> Baseline:
    """The baseline of a provider name with the weights and queues of a method's state dict."""
    baseline = Baseline(config, device, bf16=precision_of(config, device) == "bf16", compiled=MODES[name])
    baseline.load_state_dict(state)
    return baseline


def factory(name: str) -> Factory:
    """What `measure.step.measure` takes for a provider name."""

    def make(config: PretrainConfig, device: torch.device, state: dict[str, Tensor]) -> StepProvider:
        if not MODES[name] and lacks(config):
            return PlainStep(config, device, state)
        return BaselineStep(build(name, config, device, state))

    return make
