"""Gradients averaged over the processes while backward still runs.

The parameters are dealt to buckets in the order opposite to their use. As soon as every gradient of a bucket is
there, it is copied into the bucket's flat buffer and an asynchronous all-reduce begins; `finish` waits for them. Which
gradients a step has, and in which order the buckets fill, is learned in the first step (which reduces at its end) and
taken from rank 0, so that all processes start the same reductions in the same order. The division into buckets itself
never changes: a continued run adds in the same order as an uninterrupted one. A step that is recorded reduces at its end
(`captured`), to the same sums.

Unlike `DistributedDataParallel` this leaves the method's forward free to call collectives, to be called several times
a step and to use only part of its parameters; buffers are never exchanged.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from rcmstr_fast.train.distributed import World, exchange, peers, recording

BUCKET_BYTES = 25 * 2**20


class _Bucket:
    """Parameters that are reduced together, and their flat buffer."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.flat = parameters[0].new_zeros(sum(p.numel() for p in parameters), requires_grad=False)
        parts = self.flat.split([p.numel() for p in parameters])
        # In the memory order of the parameter, so that the copies run straight through.
        orders = [torch.empty_like(p, device="meta").stride() for p in parameters]
        self.views = [x.as_strided(p.shape, order) for x, p, order in zip(parts, parameters, orders, strict=True)]
        self.expected: set[int] = set()
        self.missing: set[int] = set()

    def pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients that are expected and there, and their places in the buffer."""
        found = [(p.grad, self.views[i]) for i, p in enumerate(self.parameters) if i in self.expected]
        return [g for g, _ in found if g is not None], [v for g, v in found if g is not None]

    def pack(self) -> None:
        """Copy the gradients into the buffer; what has none counts as zero."""
        gradients, views = self.pairs()
        if len(views) < len(self.views):
            self.flat.zero_()
        if views:
            torch._foreach_copy_(views, gradients)


class GradientAverage:
    """Averages the gradients of a step over the processes; a single process does nothing.

    A step calls `begin_last` before its last backward and `finish` after it. Which parameters have a gradient must be
    the same on every process; those without one keep None.

    Args:
        parameters: the trainable parameters, in the same order on every process.
        world: this process; its `gradient_group` carries the reductions.
        bucket_bytes: size of a bucket, float32.
        overlap: False: reduce all buckets at the end.
    """

    def __init__(
        self, parameters: list[Tensor], world: World, *, bucket_bytes: int = BUCKET_BYTES, overlap: bool = True
    ) -> None:
        self.world = world
        self._overlap = overlap
        self._buckets = (
            [_Bucket(members) for members in _deal(parameters, bucket_bytes)] if world.world_size > 1 else []
        )
        self._schedule: list[_Bucket] | None = None
        self._works: list[dist.Work] = []
        self._last = False
        self._fired: list[tuple[int, int]] = []
        for b, bucket in enumerate(self._buckets):
            for i, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._ready, b, i))

    def begin_last(self) -> None:
        """The next backward is the last of the step: its gradients are final as they come."""
        self._last, self._works, self._fired = True, [], []
        for bucket in self._buckets:
            bucket.missing = set(bucket.expected)

    def finish(self, beside: Tensor) -> Tensor:
        """Wait until every gradient holds its mean over the processes.

        Args:
            beside: [n] float32; more values to average.
        Returns:
            The mean of `beside`.
        Raises:
            RunError: another process is gone.
        """
        self._last = False
        if self.world.world_size == 1:
            return beside
        if self._schedule is None:
            self._learn()
        schedule, begun = self._schedule or [], self._works
        late = schedule[len(begun) :]
        for bucket in late:
            bucket.pack()
        total = beside.detach().clone()

        def reduce() -> None:
            works = [*begun, *map(self._reduce, late)]
            dist.all_reduce(total, group=self.world.gradient_group)
            for work in works:
                work.wait()

        exchange(reduce)
        for bucket in schedule:
            gradients, views = bucket.pairs()
            bucket.flat.div_(self.world.world_size)
            if gradients:
                torch._foreach_copy_(gradients, views)
        self._reduce_late()
        return total / self.world.world_size

    def _ready(self, b: int, i: int, parameter: Tensor) -> None:
        """Hook: the gradient of parameter i of bucket b is complete as far as this backward goes."""
        if not self._last:
            return
        if self._schedule is None:
            self._fired.append((b, i))
            return
        self._buckets[b].missing.discard(i)
        while self._overlap and not recording() and len(self._works) < len(self._schedule):
            bucket = self._schedule[len(self._works)]
            if bucket.missing:
                return
            bucket.pack()
            with peers():
                self._works.append(self._reduce(bucket))

    def _reduce(self, bucket: _Bucket) -> dist.Work:
        """Begin the sum over the processes."""
        return dist.all_reduce(bucket.flat, group=self.world.gradient_group, async_op=True)

    def _learn(self) -> None:
        """Take over from rank 0 which gradients there are and in which order the buckets were complete."""
        known = set(self._fired)
        earlier = [
            (b, i)
            for b, bucket in enumerate(self._buckets)
            for i, p in enumerate(bucket.parameters)
            if p.grad is not None and (b, i) not in known
        ]
        fired = self.world.on_rank0(lambda: [*self._fired, *earlier])
        complete = {}
        for when, (b, i) in enumerate(fired):
            self._buckets[b].expected.add(i)
            complete[b] = when
        self._schedule = [self._buckets[b] for b in sorted(complete, key=complete.__getitem__)]

    def _reduce_late(self) -> None:
        """Average the gradients that the first step did not have, one by one."""
        for bucket in self._buckets:
            for i, parameter in enumerate(bucket.parameters):
                if parameter.grad is not None and i not in bucket.expected:
                    parameter.grad.copy_(self.world.mean(parameter.grad))


def _deal(parameters: list[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Parameters from the last to the first in groups of at least `bucket_bytes` as float32, but for the last group."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for parameter in reversed(parameters):
        groups[-1].append(parameter)
        size += 4 * parameter.numel()
        if size >= bucket_bytes:
            groups.append([])
            size = 0
    return [group for group in groups if group]
