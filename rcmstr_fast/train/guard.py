"""Non-finite losses, gradients and weights: a bad step changes nothing, several in a row stop the run.

Every decision stays on the device; the host looks at a small vector at intervals only. What an update made is looked at
then as well, and before each save: the largest magnitude over all weights and running statistics, in a few launches.
"""

import torch
from torch import Tensor

from rcmstr_fast.config import RunError
from rcmstr_fast.train.distributed import World


class Guard:
    """Counts steps with a non-finite loss or gradient, and watches the weights.

    Args:
        limit: consecutive bad steps after which the run stops.
        world: device and processes.
        watched: names and tensors that updates change in place, the same on every process in number.
    """

    def __init__(self, limit: int, world: World, watched: dict[str, Tensor] | None = None) -> None:
        self.limit = limit
        self.world = world
        self.interval = 1 if world.device.type == "cpu" else 10
        self.total = torch.zeros((), dtype=torch.int64, device=world.device)
        self._streak = torch.zeros_like(self.total)
        self._longest = torch.zeros_like(self.total)
        self._first = torch.zeros_like(self.total)
        self._bad_terms: Tensor | None = None
        self._names: list[str] = []
        self._watched = {name: x for name, x in (watched or {}).items() if x.is_floating_point() and x.numel()}

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

    @torch.no_grad()
    def check(self, *, last: bool = False) -> None:
        """Look at the counts and at the weights (waits for the device once); every process must call it.

        Args:
            last: the run ends here: a streak that is shorter than the limit counts as well.
        Raises:
            RunError: after `limit` consecutive bad steps, naming process, step and loss term; naming the weights or
                statistics that an update has made non-finite.
        """
        longest, streak, broken = self._looked_at()
        if longest >= self.limit:
            raise RunError(
                f"{self._culprits()}; stopped after {longest} such steps in a row, the weights are those before the "
                "first of them"
            )
        if broken:
            raise RunError(
                f"the updates have made {self._first_broken()} not finite: a rate, a decay or a gradient is too large; "
                "nothing of it is saved or exported, the last checkpoint is from before"
            )
        if last and streak:
            steps = "step" if streak == 1 else f"{streak} steps"
            raise RunError(
                f"{self._culprits()}; the last {steps} of the run changed nothing: it is saved with the weights from "
                "before, but it is not finished; raise train.steps to go on"
            )

    def _looked_at(self) -> tuple[int, int, bool]:
        counts = torch.stack([self._longest, self._streak]).double()
        weights = list(self._watched.values())
        if weights:
            # The largest magnitude overflows nowhere, and NaN and infinity come through.
            largest = torch.stack([x.double() for x in torch._foreach_norm(weights, float("inf"))]).max()
            counts = torch.cat([counts, (~torch.isfinite(largest)).double()[None]])
        if self.world.world_size > 1 and weights:  # running statistics are each process's own
            rows = self.world.gather(counts[None])
            counts = torch.cat([rows[self.world.rank, :2], rows[:, 2].max()[None]])
        longest, streak, *broken = counts.tolist()
        return int(longest), int(streak), bool(broken and broken[0])

    def _culprits(self) -> str:
        """`step N: not finite: term on rank R` of the first step of the streak."""
        found = []
        if self._bad_terms is not None:
            for rank, row in enumerate(self.world.gather(self._bad_terms[None].int()).tolist()):
                names = [name for name, bad in zip(self._names, row, strict=True) if bad]
                if names:
                    found.append(f"{', '.join(names)} on rank {rank}")
        return f"step {int(self._first)}: not finite: {'; '.join(found) or 'a gradient'}"

    def _first_broken(self) -> str:
        broken = [name for name, x in self._watched.items() if not torch.isfinite(x).all()]
        others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        return (broken[0] if broken else "weights of another process") + others
