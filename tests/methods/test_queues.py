"""Sharded queues hold what a replicated one holds; the keys of a step come in the order of the global batch."""

import pytest
import torch

from rcmstr_fast.config import ConfigError
from rcmstr_fast.methods.parts.queue import Queue, ShardedQueue, StepKeys, build_queue

SIZE, DIM, WORLD = 12, 3, 3


class Together:
    """The collectives of several ranks that live in one process: `gather` looks at every rank's tensor."""

    def __init__(self, rank, world_size, everyone):
        self.rank, self.world_size, self.everyone, self.calls = rank, world_size, everyone, 0

    def gather(self, tensor):
        self.calls += 1
        return torch.cat([part() for part in self.everyone])


def sharded():
    """One queue in WORLD shards, and the same queue whole."""
    shards = []
    everyone = [lambda r=r: shards[r].shard[:-1] for r in range(WORLD)]
    for rank in range(WORLD):
        torch.manual_seed(1)
        shards.append(ShardedQueue(SIZE, DIM, Together(rank, WORLD, everyone)))
    torch.manual_seed(1)
    return shards, Queue(SIZE, DIM)


@pytest.mark.parametrize("counts", [[4, 4, 4, 4], [5, 7, 11, 1], [12, 3], [30, 5, 13], [0, 2]])
def test_shards_together_are_the_whole_queue(counts):
    shards, whole = sharded()
    for step, count in enumerate(counts):
        keys = torch.arange(count * DIM).view(count, DIM).float() + 1000 * step
        expected = whole.whole().after(keys)
        assert all(torch.equal(shard.whole().after(keys), expected) for shard in shards)
        for queue in (*shards, whole):
            queue.enqueue(keys)
        assert torch.equal(whole.rows, expected)
        for shard in shards:
            assert len(shard.shard) == SIZE // WORLD + 1
            assert torch.equal(shard.whole().rows, whole.rows) and shard.pointer == whole.pointer


def test_a_checkpoint_holds_the_whole_queue_for_any_division():
    shards, whole = sharded()
    keys = torch.randn(7, DIM)
    for queue in (*shards, whole):
        queue.enqueue(keys)
    states = [shard.state_dict() for shard in shards]
    for state in states:
        assert state.keys() == whole.state_dict().keys()
        assert all(torch.equal(state[name], x) for name, x in whole.state_dict().items())
    others, replicated = sharded()
    torch.manual_seed(9)
    replicated.load_state_dict(states[0])
    for shard in others:
        shard.shard.zero_()
        shard.load_state_dict(whole.state_dict())
    assert torch.equal(replicated.rows, whole.rows)
    assert all(torch.equal(shard.whole().rows, whole.rows) and shard.pointer == 7 for shard in others)


def test_a_foreign_state_is_refused():
    shards, _ = sharded()
    with pytest.raises(RuntimeError, match=r"rows must be \[12, 3\], got \[6, 3\]"):
        shards[0].load_state_dict({"rows": torch.zeros(6, DIM), "pointer": torch.tensor(0)})
    with pytest.raises(RuntimeError, match=r"Missing key.*rows"):
        shards[0].load_state_dict({"pointer": torch.tensor(0)})


def test_a_size_that_cannot_be_divided_is_one_line():
    with pytest.raises(ConfigError, match=r"multiple of the 3 processes in rows, got 13; change method\.queue_size"):
        build_queue("sharded", 13, DIM, Together(0, 3, []))
    assert isinstance(build_queue("sharded", 13, DIM, Together(0, 1, [])), Queue)


@pytest.mark.parametrize("each", [False, True], ids=["once a step", "after each micro-batch"])
def test_keys_of_a_step_are_in_the_order_of_the_global_batch(each):
    levels, micro, rows = ["frame", "word"], 2, {"frame": 4, "word": 2}
    steps, packed = [], {}
    for rank in range(WORLD):
        everyone = [lambda r=r: packed[r] for r in range(WORLD)]
        steps.append(StepKeys(levels, Together(rank, WORLD, everyone)))

    def exchange():
        for rank, step in enumerate(steps):
            packed[rank] = torch.stack([torch.cat([keys[level] for level in levels]) for keys in step._local])
        return [step.gather() for step in steps]

    for part in range(micro):
        for rank, step in enumerate(steps):
            step.add({level: torch.full((n, DIM), 10.0 * part + rank) for level, n in rows.items()})
        if each:
            exchange()
    done = exchange() if not each else [step.gather() for step in steps]
    order = torch.tensor([10.0 * part + rank for part in range(micro) for rank in range(WORLD)])
    for step, keys in zip(steps, done, strict=True):
        assert step.collectives.calls == (micro if each else 1)
        for level, n in rows.items():
            assert torch.equal(keys[level][:, 0], order.repeat_interleave(n))
        step.clear()
        assert not step._local and not step._gathered


def test_one_process_needs_no_exchange():
    step = StepKeys(["word"], Together(0, 1, []))
    parts = [torch.randn(2, DIM) for _ in range(2)]
    for part in parts:
        step.add({"word": part})
    assert torch.equal(step.gather()["word"], torch.cat(parts)) and step.collectives.calls == 0
