"""The baselines as providers of `rcmstr_fast.train.step_speed`: eager, compiled, compiled with max-autotune."""

import torch
from torch import Tensor

from bench.step.baseline import Baseline
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.methods import Batch
from rcmstr_fast.train.distributed import use_bf16
from rcmstr_fast.train.step_speed import Factory

#: provider -> mode of torch.compile; empty: eager
MODES = {"eager": "", "compile": "default", "compile_max": "max-autotune-no-cudagraphs"}


class BaselineStep:
    """The baseline behind the two methods that the benchmark calls."""

    def __init__(self, baseline: Baseline) -> None:
        self.baseline = baseline

    def first_loss(self, batch: Batch) -> float:
        """Loss of a batch; its gradients are forgotten."""
        loss, _ = self.baseline.gradients(batch)
        self.baseline.optimizer.zero_grad()
        return float(loss)

    def step(self, batches: list[Batch]) -> None:
        """One step."""
        self.baseline.step(batches[0])


def build(name: str, config: PretrainConfig, device: torch.device, state: dict[str, Tensor]) -> Baseline:
    """The baseline of a provider name with the weights and queues of a method's state dict."""
    bf16 = use_bf16(config.train.precision, device)
    baseline = Baseline(config, device, bf16=bf16, compiled=MODES[name])
    baseline.load_state_dict(state)
    return baseline


def factory(name: str) -> Factory:
    """What `step_speed.measure` takes for a provider name."""
    return lambda config, device, state: BaselineStep(build(name, config, device, state))
