"""One optimiser step as a function of tensors: what may be recorded once and replayed.

Everything that changes from step to step is a tensor on the device (the batch, the step's number, epoch and learning
rate), and everything a step leaves behind is written in place: parameters, momentum network, queues, optimiser, guard,
meter. The host decides nothing inside a step and waits for nothing.
"""

from dataclasses import replace

import torch
from torch import Tensor

from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.methods.protocol import Batch, PretrainMethod, StepOutput
from rcmstr_fast.models.batch_norm import HeldStatistics, norms_of
from rcmstr_fast.models.conv_norm import WorkingWeights
from rcmstr_fast.train.distributed import World, use_bf16
from rcmstr_fast.train.gradients import GradientAverage
from rcmstr_fast.train.guard import Guard
from rcmstr_fast.train.log import Meter
from rcmstr_fast.train.optim import apply_gradients, weight_decay

#: Monitors and pictures of a step.
Shown = tuple[dict[str, Tensor], dict[str, Tensor]]


class Step:
    """Forward and backward of every micro-batch, the update, the enqueue.

    Args:
        config: resolved.
        world: this process.
        method: on the device, in training mode.
        optimizer: of `build_optimizer`.
        guard: counts non-finite steps.
        meter: collects the terms.
    """

    def __init__(
        self,
        config: PretrainConfig,
        world: World,
        method: PretrainMethod,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        meter: Meter,
    ) -> None:
        self.world, self.method, self.optimizer, self.guard, self.meter = world, method, optimizer, guard, meter
        self.parameters: list[Tensor] = [p for p in method.parameters() if p.requires_grad]
        self.statistics = HeldStatistics(norms_of(method))
        self.gradients = GradientAverage(self.parameters, world)
        self.bf16 = use_bf16(config.train.precision, world.device)
        self.weights = WorkingWeights(method, torch.bfloat16 if self.bf16 else None)
        self.optim, self.clip = config.optim, float(config.optim.clip or 0.0)
        self.number, self.epoch = (torch.zeros((), dtype=torch.int64, device=world.device) for _ in range(2))
        self.rate, self.progress = (torch.zeros((), device=world.device) for _ in range(2))
        self.requests, self.requested = (torch.zeros(2, device=world.device) for _ in range(2))

    def set(
        self, number: int, epoch: int, rate: float, requests: tuple[bool, bool] = (False, False), progress: float = 0.0
    ) -> None:
        """Say which step comes next, without waiting for the device.

        Args:
            number: of the step, from 1.
            epoch: 0-based.
            rate: learning rate.
            requests: what this process asks of all (stop, save); the sums over steps and the means over processes
                appear in `requested`.
            progress: share of the run that is done.
        """
        self.number.fill_(number)
        self.epoch.fill_(epoch)
        self.rate.fill_(rate)
        self.progress.fill_(progress)
        if self.world.world_size > 1:
            for place, asked in zip(self.requests, requests, strict=True):
                place.fill_(float(asked))

    def __call__(self, micro: list[Batch], monitor: bool, pictures: bool = False) -> Shown:
        """Take the step.

        Args:
            micro: the micro-batches of this process.
            monitor: also compute the monitors.
            pictures: also return the pictures of the first micro-batch.
        """
        outputs: list[StepOutput] = []
        whole = torch.cat([batch.index for batch in micro]) if len(micro) > 1 else None
        self.method.begin_step(self.progress)
        self.weights.refresh()
        self.optimizer.zero_grad()
        for number, part in enumerate(micro):
            with self.statistics.held(), self.weights.shared():
                with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16):
                    batch = replace(part, step_index=whole)
                    output = self.method(batch, monitor=monitor, pictures=pictures and number == 0)
                if number == len(micro) - 1:
                    self.gradients.begin_last()
                (output.loss / len(micro)).backward()
            outputs.append(replace(output, loss=output.loss.detach()))
        self._update(_means([{"loss": output.loss, **output.terms} for output in outputs]))
        return _means([output.monitors for output in outputs]), outputs[0].pictures

    def _update(self, terms: dict[str, Tensor]) -> None:
        """Average the gradients and change the weights, unless something is not finite."""
        loss, *requests = self.gradients.finish(torch.cat([terms["loss"][None], self.requests]))
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        finite = torch.isfinite(norm) & torch.isfinite(loss)
        decay = weight_decay(self.progress, self.optim)
        apply_gradients(self.optimizer, self.rate, norm, finite, self.clip, decay)
        self.method.end_step(finite)
        self.statistics.move(finite)
        self.guard.end_step(self.number, finite, terms)
        self.meter.add({**terms, "grad_norm": norm}, finite)
        self.requested += torch.stack(requests)


def _means(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Means of the values of each name, 0-d float32, in a few operations."""
    rows = [torch.stack([x.detach() for x in values.values()]) for values in found if values]
    return dict(zip(found[0], torch.stack(rows).float().mean(0), strict=True)) if rows else {}
