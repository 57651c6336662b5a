"""Non-finite losses and gradients: such a step changes nothing, several in a row stop the run.

Every decision stays on the device; the host looks at a small vector at intervals only.
"""

import torch
from torch import Tensor

from rcmstr_fast.config import RunError
from rcmstr_fast.train.distributed import World


class Guard:
    """Counts steps with a non-finite loss or gradient.

    Args:
        limit: consecutive bad steps after which the run stops.
        world: device and processes.
    """

    def __init__(self, limit: int, world: World) -> None:
        self.limit = limit
        self.world = world
        self.interval = 1 if world.device.type == "cpu" else 10
        self.total = torch.zeros((), dtype=torch.int64, device=world.device)
        self._streak = torch.zeros_like(self.total)
        self._longest = torch.zeros_like(self.total)
        self._first = torch.zeros_like(self.total)
        self._bad_terms: Tensor | None = None
        self._names: list[str] = []

    def end_step(self, step: Tensor, finite: Tensor, terms: dict[str, Tensor]) -> None:
        """Count the step, in place.

        Args:
            step: 0-d int64, number of the step.
            finite: 0-d bool, the same on every process.
            terms: loss terms of this process, 0-d, the culprits to name.
        """
        self._names = list(terms)
        bad_terms = ~torch.isfinite(torch.stack([x.detach().float() for x in terms.values()]))
        if self._bad_terms is None:
            self._bad_terms = bad_terms.clone()
        starts = ~finite & (self._streak == 0)
        self._first.copy_(torch.where(starts, step, self._first))
        self._bad_terms.copy_(torch.where(starts, bad_terms, self._bad_terms))
        self.total += ~finite
        self._streak.copy_(torch.where(finite, 0, self._streak + 1))
        self._longest.copy_(torch.maximum(self._longest, self._streak))

    def state(self) -> Tensor:
        """The counts, [4] int64, for the checkpoint."""
        return torch.stack([self.total, self._streak, self._longest, self._first]).cpu()

    def load_state(self, state: Tensor) -> None:
        """Continue counting."""
        for count, saved in zip((self.total, self._streak, self._longest, self._first), state, strict=True):
            count.copy_(saved)

    def check(self) -> None:
        """Look at the count (waits for the device).

        Raises:
            RunError: naming process, step and loss term, after `limit` consecutive bad steps.
        """
        if int(self._longest) < self.limit or self._bad_terms is None:
            return
        culprits = []
        for rank, row in enumerate(self.world.gather(self._bad_terms[None].int()).tolist()):
            names = [name for name, bad in zip(self._names, row, strict=True) if bad]
            if names:
                culprits.append(f"{', '.join(names)} on rank {rank}")
        raise RunError(
            f"step {int(self._first)}: not finite: {'; '.join(culprits) or 'a gradient'}; "
            f"stopped after {int(self._longest)} such steps in a row, the weights are those before the first of them"
        )
