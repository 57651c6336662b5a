"""Any method as a plain PyTorch training loop: the baseline of those that `baseline` does not write out by hand.

The method's own formulas with none of the project's operations behind them: every operation is its reference (dense
convolution times mask, whole similarity matrices), batch norm is `torch.nn.functional.batch_norm` with its running
statistics, the optimiser is torch's, and the loop has no guard, no meters and no clipping. What it cannot show is a
method whose formulas themselves are written slowly: they are the same on both sides.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.measure.running import precision_of
from rcmstr_fast.methods import build_method
from rcmstr_fast.models.batch_norm import GroupedBatchNorm, norms_of
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.optim import build_optimizer

_PLAIN = {"RCMSTR_FAST_BACKEND": "reference", "RCMSTR_FAST_MASKED_STAGES": "dense"}


class PlainBatchNorm(GroupedBatchNorm):
    """Batch norm by torch alone, its running statistics moved where they are measured."""

    def _train(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        if self.group_size:
            return super()._train(x, residual, relu)
        running = (self.running_mean, self.running_var) if self.tracking else (None, None)
        parts = [
            F.batch_norm(part, *running, self.weight, self.bias, True, self.momentum or 0.0, self.eps)
            for part in self._rows(x).chunk(self.passes)
        ]
        y = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y


@contextmanager
def plain_operations() -> Iterator[None]:
    """Order the reference of every operation while entered."""
    before = {name: os.environ.get(name) for name in _PLAIN}
    os.environ.update(_PLAIN)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class PlainStep:
    """The step of a method, as a provider of `rcmstr_fast.measure.step`.

    Args:
        config: resolved; no accumulation.
        device: where it runs.
        state: initial state dict of the method.
    """

    def __init__(self, config: PretrainConfig, device: torch.device, state: dict[str, Tensor]) -> None:
        self.method = build_method(config, World(device))
        self.method.load_state_dict(state)
        for layer in norms_of(self.method):
            layer.__class__ = PlainBatchNorm  # the same parameters and buffers, another forward
        self.method.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.optimizer = optimizer(self.method, config)
        self.device, self.bf16 = device, precision_of(config, device) == "bf16"

    def first_loss(self, batch: Any) -> float:
        """Loss of a batch."""
        with plain_operations(), torch.no_grad():
            return float(self._loss(batch))

    def step(self, batches: list[Any]) -> None:
        """One step; a step of several micro-batches adds up their gradients."""
        with plain_operations():
            self.method.begin_step()
            self.optimizer.zero_grad()
            for batch in batches:
                (self._loss(batch) / len(batches)).backward()
            self.optimizer.step()
            self.method.end_step()

    def _loss(self, batch: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.method(batch, monitor=False).loss


def optimizer(method: torch.nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """Torch's own: AdamW and SGD are so in the trainer as well."""
    if config.optim.name != "adadelta":
        return build_optimizer(method, config.optim)
    trained = [p for p in method.parameters() if p.requires_grad]
    optim = config.optim
    return torch.optim.Adadelta(
        trained, lr=float(optim.lr or 0), rho=optim.rho, weight_decay=float(optim.weight_decay or 0)
    )
