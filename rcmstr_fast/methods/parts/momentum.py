"""A copy of a network that follows it slowly (MoCo, He et al., CVPR 2020)."""

import copy
import math
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from rcmstr_fast.fields import number
from rcmstr_fast.ops.momentum_update import momentum_update_


@dataclass
class MomentumSettings:
    """Fields of a method with a momentum network.

    Attributes:
        momentum: momentum m of the key encoder; with a ramp its value at the beginning.
        momentum_ramp: none (m stays) or cosine (m rises to 1 by a half cosine over the run, as in DiG and iBOT).
    """

    momentum: float = number(0.999, low=0, high=1)
    momentum_ramp: Literal["none", "cosine"] = "none"


N = TypeVar("N", bound=nn.Module)


class Momentum(nn.Module, Generic[N]):
    """The copy; parameters follow, batch-norm buffers are the copy's own.

    Args:
        online: the network to follow.
        settings: m and its ramp.
    Attributes:
        network: the copy, without gradients.
    """

    network: N

    def __init__(self, online: N, settings: MomentumSettings) -> None:
        super().__init__()
        self.network = copy.deepcopy(online).requires_grad_(False)
        self._momentum, self._ramp = settings.momentum, settings.momentum_ramp

    @torch.no_grad()
    def update(self, online: nn.Module, progress: Tensor | None = None) -> None:
        """parameters = m * parameters + (1 - m) * online parameters; once a step.

        Args:
            online: the network to follow.
            progress: 0-d, as of `Batch`; None: the run's beginning.
        """
        followers: list[Tensor] = list(self.network.parameters())
        leaders: list[Tensor] = list(online.parameters())
        if self._ramp == "none" or progress is None:
            momentum_update_(followers, leaders, self._momentum)
        else:
            _approach_(followers, leaders, (1.0 - self._momentum) * half_cosine(progress))


def half_cosine(progress: Tensor) -> Tensor:
    """From 1 at progress 0 to 0 at progress 1 by half a cosine."""
    return 0.5 * (1.0 + torch.cos(math.pi * progress))


def _approach_(followers: list[Tensor], leaders: list[Tensor], share: Tensor) -> None:
    """followers += share * (leaders - followers), with a share that is known on the device only."""
    steps = torch._foreach_sub(leaders, followers)
    torch._foreach_mul_(steps, share)
    torch._foreach_add_(followers, steps)
