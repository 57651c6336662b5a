"""Optimiser, parameter groups and the learning rate of a step (SPEC section 8)."""

import math

import torch
from torch import Tensor, nn

from rcmstr_fast.config import OptimConfig
from rcmstr_fast.train.plan import Plan


def is_vector(parameter: Tensor) -> bool:
    """True for parameters with one dimension longer than 1: biases, norms, tokens; AdamW does not decay them."""
    return parameter.numel() == max(parameter.shape, default=1)


def build_optimizer(method: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over the parameters that need a gradient.

    Both are the fused implementations, which take `grad_scale` and `found_inf` tensors: that is how a step is
    clipped and a non-finite step is skipped without waiting for the device. They move 28 bytes a parameter (AdamW) in
    a few launches; with the momentum update's 12 that is 40, and one kernel for both could save no more than the 4 of
    reading the parameter once, so there is none.

    Args:
        method: its trainable parameters, in the order of `named_parameters`.
        config: resolved.
    """
    trainable = [p for p in method.parameters() if p.requires_grad]
    lr, decay = float(config.lr or 0.0), float(config.weight_decay or 0.0)
    if config.name == "sgd":
        sgd = torch.optim.SGD(trainable, lr=lr, momentum=config.sgd_momentum, weight_decay=decay, fused=True)
        if config.sgd_momentum:  # torch leaves a new buffer uninitialised where the first step is skipped
            for parameter in trainable:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    groups = [
        {"params": [p for p in trainable if not is_vector(p)], "weight_decay": decay},
        {"params": [p for p in trainable if is_vector(p)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    on_gpu = any(p.device.type == "cuda" for p in trainable)  # only there may a step be recorded
    return torch.optim.AdamW(groups, lr=lr, betas=(config.beta1, config.beta2), fused=True, capturable=on_gpu)


def learning_rate(step: int, config: OptimConfig, plan: Plan) -> float:
    """Learning rate of the 0-based step: linear warm-up, then cosine to `min_lr` or constant."""
    lr, least = float(config.lr or 0.0), float(config.min_lr or 0.0)
    if step < plan.warmup_steps:
        return lr * (step + 1) / plan.warmup_steps
    if config.schedule == "constant":
        return lr
    part = (step - plan.warmup_steps) / max(1, plan.total_steps - plan.warmup_steps)
    return least + 0.5 * (lr - least) * (1 + math.cos(math.pi * min(part, 1.0)))


def apply_gradients(
    optimizer: torch.optim.Optimizer, lr: float | Tensor, norm: Tensor, finite: Tensor, clip: float
) -> None:
    """One optimiser step, clipped to `clip` (0: not at all); nothing changes where `finite` is False.

    Args:
        optimizer: of `build_optimizer`, with gradients in place.
        lr: learning rate; 0-d float32 on the device where the step is recorded.
        norm: 0-d float32, norm of all gradients.
        finite: 0-d bool on the device.
        clip: gradient-norm limit.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = (~finite).float()
    optimizer.grad_scale = (norm / clip).clamp(min=1.0).float() if clip else None
    optimizer.step()
