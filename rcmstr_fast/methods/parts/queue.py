"""The queues of earlier keys, one a level, and the exchange of a step's keys between the processes.

A queue is a ring buffer of L2-normalised rows. Replicated, every process holds all K rows. Sharded, process r of W
holds the rows r K / W to (r + 1) K / W - 1, and `whole` gathers them for a forward pass; the rows and their order are
the same, hence the losses too.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.config import ConfigError
from rcmstr_fast.fields import number
from rcmstr_fast.methods.protocol import Collectives
from rcmstr_fast.ops.enqueue import enqueue_


@dataclass
class QueueSettings:
    """Fields of a method with queues.

    Attributes:
        queue_size: rows of each queue (K).
        queue: replicated (every process holds all rows) or sharded (K / processes each, gathered for each comparison;
            the same losses).
    """

    queue_size: int = number(65536, low=1)
    queue: Literal["replicated", "sharded"] = "replicated"


@dataclass
class WholeQueue:
    """A queue for the length of a forward pass.

    Attributes:
        rows: [K, D].
        pointer: 0-d int64; the next row to be written.
    """

    rows: Tensor
    pointer: Tensor

    def after(self, keys: Tensor) -> Tensor:
        """The rows `[K, D]` as they will be once `keys` `[n, D]` are enqueued; the queue stays as it is."""
        rows, pointer = self.rows.clone(), self.pointer.clone()
        enqueue_(rows, pointer, keys)
        return rows


class Queue(nn.Module):
    """Ring buffer `rows [K, D]` of keys, filled with normalised Gaussian rows at the start.

    Args:
        size: rows K.
        dim: row size D.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.rows: Tensor
        self.pointer: Tensor
        self.register_buffer("rows", _random_rows(size, dim))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def enqueue(self, keys: Tensor) -> None:
        """Write keys `[n, D]` at the pointer, in place."""
        enqueue_(self.rows, self.pointer, keys)

    def whole(self) -> WholeQueue:
        """The queue to compare with."""
        return WholeQueue(self.rows, self.pointer)


class ShardedQueue(nn.Module):
    """The same queue with K / W rows a process.

    `whole` and `state_dict` gather: every process must call them in the same order. The state dict holds the
    whole queue, that of a `Queue`, so that a run may go on with another number of processes or replicated.

    Args:
        size: rows K of the whole queue.
        dim: row size D.
        collectives: exchange with the other processes.
    Raises:
        ConfigError: K is not a multiple of the number of processes.
    """

    def __init__(self, size: int, dim: int, collectives: Collectives) -> None:
        super().__init__()
        if size % collectives.world_size:
            raise ConfigError(
                f"method.queue=sharded must have a queue of a multiple of the {collectives.world_size} processes in "
                f"rows, got {size}; change method.queue_size or use method.queue=replicated"
            )
        self.size, self.collectives = size, collectives
        share = size // collectives.world_size
        self.mine = slice(collectives.rank * share, (collectives.rank + 1) * share)
        self.shard: Tensor
        self.pointer: Tensor
        # One more row takes the keys that belong to other processes: they need no selection on the host.
        shard = F.pad(_random_rows(size, dim)[self.mine], (0, 0, 0, 1))
        self.register_buffer("shard", shard, persistent=False)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def whole(self) -> WholeQueue:
        """The queue to compare with, gathered anew."""
        return WholeQueue(self.collectives.gather(self.shard[:-1]), self.pointer)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write keys `[n, D]`, the same on every process, at the pointer, in place."""
        count, share = len(keys), len(self.shard) - 1
        skipped = max(0, count - self.size)
        place = (self.pointer + torch.arange(skipped, count, device=keys.device)) % self.size - self.mine.start
        place = torch.where((place >= 0) & (place < share), place, share)
        self.shard.index_copy_(0, place, keys[skipped:].to(self.shard.dtype))
        self.pointer.add_(count).remainder_(self.size)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}rows"] = self.whole().rows

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        name = f"{prefix}rows"
        others = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(others, prefix, *rest)
        *_, missing, _, errors = rest
        held, wanted = state_dict.get(name), (self.size, self.shard.shape[1])
        if held is None:
            missing.append(name)
        elif tuple(held.shape) != wanted:
            errors.append(f"{name} must be {list(wanted)}, got {list(held.shape)}")
        else:
            with torch.no_grad():
                self.shard[:-1].copy_(held[self.mine])


def build_queue(kind: str, size: int, dim: int, collectives: Collectives) -> Queue | ShardedQueue:
    """The queue that `method.queue` names; a single process has nothing to shard."""
    if kind == "sharded" and collectives.world_size > 1:
        return ShardedQueue(size, dim, collectives)
    return Queue(size, dim)


class StepKeys:
    """The keys of a step: those of this process as they come, those of all processes after one all-gather.

    Args:
        levels: in the order in which they are packed.
        collectives: exchange with the other processes.
    """

    def __init__(self, levels: list[str], collectives: Collectives) -> None:
        self.levels, self.collectives = levels, collectives
        self._local: list[dict[str, Tensor]] = []
        self._gathered: list[dict[str, Tensor]] = []

    def add(self, keys: dict[str, Tensor]) -> None:
        """Keep the keys of a micro-batch: level -> `[n, D]`, the same shapes in every micro-batch and process."""
        self._local.append(keys)

    def gather(self) -> dict[str, Tensor]:
        """All keys of the step so far, level -> `[W A n, D]`, in the order of the global batch: by micro-batch, in it
        by process. Keys that were not exchanged yet are, levels and micro-batches in one all-gather."""
        if self._local:
            self._gathered.append(self._exchange(self._local))
            self._local = []
        return {level: _joined([part[level] for part in self._gathered]) for level in self.levels}

    def clear(self) -> None:
        """The step is over."""
        self._local, self._gathered = [], []

    def _exchange(self, micro: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.collectives.world_size == 1:
            return {level: _joined([keys[level] for keys in micro]) for level in self.levels}
        counts = [len(micro[0][level]) for level in self.levels]
        packed = torch.stack([torch.cat([keys[level] for level in self.levels]) for keys in micro])
        whole = self.collectives.gather(packed).unflatten(0, (-1, len(micro))).transpose(0, 1)
        return {level: rows.flatten(0, 2) for level, rows in zip(self.levels, whole.split(counts, dim=2), strict=True)}


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _random_rows(size: int, dim: int) -> Tensor:
    return F.normalize(torch.randn(size, dim), dim=1)
