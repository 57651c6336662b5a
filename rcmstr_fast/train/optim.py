"""Optimiser, parameter groups and the learning rate of a step."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rcmstr_fast.config import OptimConfig
from rcmstr_fast.train.adadelta import Adadelta
from rcmstr_fast.train.plan import Plan

#: Key of a parameter group's factor of the learning rate.
RATE = "rate"
#: Key of a parameter group whose weight decay changes from step to step.
RAMPED = "ramped"


def is_vector(parameter: Tensor) -> bool:
    """True for parameters with one dimension longer than 1: biases, norms, tokens; AdamW does not decay them."""
    return parameter.numel() == max(parameter.shape, default=1)


def build_optimizer(method: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, SGD or AdaDelta over the parameters that need a gradient.

    The first two are torch's fused implementations, which take `grad_scale` and `found_inf` tensors: that is how a step
    is clipped and a non-finite step is skipped without waiting for the device. They move 28 bytes a parameter (AdamW) in
    a few launches; with the momentum update's 12 that is 40, and one kernel for both could save no more than the 4 of
    reading the parameter once, so there is none.

    Args:
        method: its trainable parameters, in the order of `named_parameters`; its `rates()`, if it has any, are the
            factors of the learning rate by the beginning of their names, one group (AdamW: two) each.
        config: resolved.
    """
    lr, decay = float(config.lr or 0.0), float(config.weight_decay or 0.0)
    groups = _groups(method, decay if config.name == "adamw" else None, config.weight_decay_end is not None)
    if config.name == "adadelta":
        return Adadelta(groups, lr=lr, rho=config.rho, weight_decay=decay)
    if config.name == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=config.sgd_momentum, weight_decay=decay, fused=True)
        if config.sgd_momentum:  # torch leaves a new buffer uninitialised where the first step is skipped
            for group in sgd.param_groups:
                for parameter in group["params"]:
                    sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    on_gpu = any(p.device.type == "cuda" for p in method.parameters())  # only there may a step be recorded
    return torch.optim.AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), fused=True, capturable=on_gpu)


def _groups(method: nn.Module, decay: float | None, ramped: bool = False) -> list[dict[str, Any]]:
    """Parameter groups by factor of the rate; with `decay` also apart by whether they are decayed.

    A ramped decay is left to `apply_gradients`: torch's own is a number of the host, which a recorded step would keep.
    """
    rates: dict[str, float] = getattr(method, "rates", dict)()
    trainable: dict[float, list[Tensor]] = {1.0: []}
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            factor = next((rate for start, rate in rates.items() if name.startswith(start)), 1.0)
            trainable.setdefault(factor, []).append(parameter)
    groups: list[dict[str, Any]] = []
    for factor, found in trainable.items():
        own = {} if factor == 1.0 else {RATE: factor}
        if decay is None:
            groups.append({"params": found, **own})
            continue
        decayed = {"weight_decay": 0.0, RAMPED: True} if ramped else {"weight_decay": decay}
        groups.append({"params": [p for p in found if not is_vector(p)], **decayed, **own})
        groups.append({"params": [p for p in found if is_vector(p)], "weight_decay": 0.0, **own})
    return [group for group in groups if group["params"]]


def learning_rate(step: int, config: OptimConfig, plan: Plan) -> float:
    """Learning rate of the 0-based step: linear warm-up, then constant, cosine to `min_lr`, or step.

    `step` divides by 10 after 60 % and once more after 80 % of the run (SeqCLR, appendix C).
    """
    lr, least = float(config.lr or 0.0), float(config.min_lr or 0.0)
    if step < plan.warmup_steps:
        return min(lr, lr * (step + 1) / plan.warmup_steps)
    if config.schedule == "constant":
        return lr
    if config.schedule == "step":
        return lr * 0.1 ** sum(10 * step >= tenths * plan.total_steps for tenths in (6, 8))
    part = (step - plan.warmup_steps) / max(1, plan.total_steps - plan.warmup_steps)
    return min(lr, least + 0.5 * (lr - least) * (1 + math.cos(math.pi * min(part, 1.0))))


def weight_decay(progress: Tensor, config: OptimConfig) -> Tensor | None:
    """Weight decay of a step, where it is ramped: by half a cosine over the whole run (as DINO and iBOT have it).

    Args:
        progress: 0-d, share of the run that is done.
        config: resolved.
    Returns:
        0-d float32; None where the optimiser's own decay stays.
    """
    if config.weight_decay_end is None:
        return None
    start, end = float(config.weight_decay or 0.0), config.weight_decay_end
    return end + 0.5 * (start - end) * (1 + torch.cos(math.pi * progress))


def apply_gradients(
    optimizer: torch.optim.Optimizer,
    lr: float | Tensor,
    norm: Tensor,
    finite: Tensor,
    clip: float,
    decay: Tensor | None = None,
) -> None:
    """One optimiser step, clipped to `clip` (0: not at all); nothing changes where `finite` is False.

    Args:
        optimizer: of `build_optimizer`, with gradients in place.
        lr: learning rate; 0-d float32 on the device where the step is recorded.
        norm: 0-d float32, norm of all gradients.
        finite: 0-d bool on the device.
        clip: gradient-norm limit.
        decay: 0-d, weight decay of the ramped groups; AdamW's, so it shrinks the weights by lr * decay and is no part of
            the gradient.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group[RATE] if RATE in group else lr
        if decay is not None and RAMPED in group:
            with torch.no_grad():
                torch._foreach_mul_(group["params"], torch.where(finite, 1.0 - group["lr"] * decay, 1.0))
    # The fused optimisers read these two; torch declares them nowhere.
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.grad_scale = (norm / clip).clamp(min=1.0).float() if clip else None  # type: ignore[attr-defined]
    optimizer.step()
