"""AdaDelta (Zeiler, 2012) that is clipped, and skips a bad step, without waiting for the device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: What the operations over lists of tensors take and give.
Tensors = list[Tensor] | tuple[Tensor, ...]


class Adadelta(torch.optim.Optimizer):
    """`torch.optim.Adadelta` with the `grad_scale` and `found_inf` of torch's fused optimisers.

    Args:
        params: parameters or groups.
        lr: factor of the step; a float, or a 0-d tensor on the device.
        rho: decay of both averages.
        eps: added under the roots.
        weight_decay: L2 penalty, on every parameter.
    Attributes:
        found_inf: 0-d float32; 1 leaves parameters and state as they are. None: 0.
        grad_scale: 0-d float32 that gradients are divided by. None: 1.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self, params: Any, lr: float = 1.0, rho: float = 0.9, eps: float = 1e-6, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "rho": rho, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:  # at once: a first step that is skipped must leave them at zero
            for p in group["params"]:
                self.state[p] = {"square_avg": torch.zeros_like(p), "acc_delta": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; `closure` is not supported."""
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            if found:
                self._update(group, found)

    def _update(self, group: dict[str, Any], found: list[Tensor]) -> None:
        rho, eps = group["rho"], group["eps"]
        squares = [self.state[p]["square_avg"] for p in found]
        moved = [self.state[p]["acc_delta"] for p in found]
        gradients: Tensors = [p.grad for p in found if p.grad is not None]
        if self.grad_scale is not None:
            gradients = torch._foreach_div(gradients, self.grad_scale)
        if group["weight_decay"]:
            gradients = torch._foreach_add(gradients, found, alpha=group["weight_decay"])
        new_squares = torch._foreach_mul(squares, rho)
        torch._foreach_addcmul_(new_squares, gradients, gradients, 1 - rho)
        below = torch._foreach_add(new_squares, eps)
        torch._foreach_sqrt_(below)
        step = torch._foreach_add(moved, eps)
        torch._foreach_sqrt_(step)
        torch._foreach_div_(step, below)
        torch._foreach_mul_(step, gradients)
        new_moved = torch._foreach_mul(moved, rho)
        torch._foreach_addcmul_(new_moved, step, step, 1 - rho)
        torch._foreach_mul_(step, group["lr"])
        new = torch._foreach_sub(found, step)
        for old, fresh in ((squares, new_squares), (moved, new_moved), (found, new)):
            kept: Tensors = fresh
            if self.found_inf is not None:
                kept = [torch.where(self.found_inf > 0, a, b) for a, b in zip(old, fresh, strict=True)]
            torch._foreach_copy_(old, kept)
