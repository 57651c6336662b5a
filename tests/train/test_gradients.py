"""Averaged gradients: the same with and without overlap, at any bucket size, whatever has no gradient."""

import sys

import pytest
import torch
from torch import nn

from rcmstr_fast.train.distributed import World, joined
from rcmstr_fast.train.gradients import GradientAverage, _deal
from tests.train.launch import launch

STEPS, MICRO = 4, 2


class Net(nn.Module):
    """A weight in channels-last order, one that is used twice, one never, one from the third step on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.unused = nn.Parameter(torch.ones(5))
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.shared = nn.Linear(4, 4)
        self.sometimes = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x, step):
        x = self.conv(x).mean((2, 3))
        x = self.shared(torch.tanh(self.shared(x)))
        return self.head(self.sometimes(x) if step > 1 else x).square().mean()


def inputs(step, micro, rank, device):
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randn(2, 3, 6, 6, generator=generator).to(device)


def gradients(net, world, average, step):
    """Averaged gradients of a step by name, the means beside them, and the buckets under way before `finish`."""
    net.zero_grad()
    for micro in range(MICRO):
        if micro == MICRO - 1:
            average.begin_last()
        net(inputs(step, micro, world.rank, world.device), step).backward()
    under_way = len(average._works)
    beside = average.finish(torch.tensor([float(world.rank), 3.0], device=world.device))
    return {name: p.grad for name, p in net.named_parameters()}, beside, under_way


def main(words):
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    with joined(words[0]) as world:
        for size in (1, 200, 2**20):
            for overlap in (True, False):
                net, twin = Net().to(world.device), Net().to(world.device)
                average = GradientAverage(list(net.parameters()), world, bucket_bytes=size, overlap=overlap)
                for step in range(STEPS):
                    found, beside, under_way = gradients(net, world, average, step)
                    assert beside.tolist() == [(world.world_size - 1) / 2, 3.0]
                    assert (under_way > 0) == (overlap and step > 0), (size, overlap, step)
                    twin.zero_grad()
                    for rank in range(world.world_size):
                        for micro in range(MICRO):
                            (twin(inputs(step, micro, rank, world.device), step) / world.world_size).backward()
                    for name, p in twin.named_parameters():
                        assert (p.grad is None) == (found[name] is None), (step, name)
                        if p.grad is not None:
                            torch.testing.assert_close(found[name], p.grad, rtol=1e-5, atol=1e-6, msg=name)
    return 0


@pytest.mark.parametrize("processes", [2, 3])
def test_the_average_is_that_of_all_processes(processes):
    done = launch("tests.train.test_gradients", "cpu", processes=processes)
    assert [status for status, _ in done] == [0] * processes, done


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_the_average_is_that_of_two_gpus():
    done = launch("tests.train.test_gradients", "cuda")
    assert [status for status, _ in done] == [0, 0], done


def test_a_single_process_does_nothing():
    net = Net()
    average = GradientAverage(list(net.parameters()), World(torch.device("cpu")))
    found, beside, under_way = gradients(net, World(torch.device("cpu")), average, 0)
    assert under_way == 0 and beside.tolist() == [0.0, 3.0] and found["unused"] is None
    assert not net.head.weight._post_accumulate_grad_hooks


def test_buckets_hold_every_parameter_once_from_the_last_on():
    parameters = [torch.zeros(n) for n in (3, 1, 4, 1, 5)]
    groups = _deal(parameters, 4 * 5)
    assert [[len(p) for p in group] for group in groups] == [[5], [1, 4], [1, 3]]
    assert [len(group) for group in _deal(parameters, 1)] == [1] * 5


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
