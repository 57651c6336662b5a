import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rcmstr_fast.models.batch_norm import (
    GroupedBatchNorm,
    HeldStatistics,
    batch_norm_state,
    group_sizes,
    norms_of,
    set_bn_groups,
)

MAPS, ROWS, TOKENS = (7, 5, 3, 4), (7, 5), (7, 6, 5)


def layer(dims: int, group_size: int = 0, affine: bool = True) -> GroupedBatchNorm:
    bn = GroupedBatchNorm(5, dims, affine=affine, group_size=group_size).double()
    if affine:
        nn.init.normal_(bn.weight)
        nn.init.normal_(bn.bias)
    return bn


def per_group(bn: GroupedBatchNorm, x: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own layer on each group; the outputs, and the means over the groups of the updated statistics."""
    outputs, stats = [], []
    for part in x.split(sizes):
        theirs = (nn.BatchNorm2d if bn.dims == 2 else nn.BatchNorm1d)(5, affine=bn.affine).double()
        theirs.load_state_dict(bn.state_dict())
        rows = part if bn.dims == 2 else part.reshape(-1, 5)
        outputs.append(theirs(rows).view(part.shape))
        stats.append(torch.stack([theirs.running_mean, theirs.running_var]))
    return torch.cat(outputs), torch.stack(stats).mean(0)


@pytest.mark.parametrize("shape", [MAPS, ROWS, TOKENS])
@pytest.mark.parametrize(("group_size", "sizes"), [(0, [7]), (2, [2, 2, 3]), (4, [4, 3]), (3, [3, 4]), (9, [7])])
@pytest.mark.parametrize("affine", [True, False])
def test_equals_batch_norm_of_each_group(shape, group_size, sizes, affine):
    torch.manual_seed(0)
    bn = layer(2 if shape == MAPS else 1, group_size, affine)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(shape, dtype=torch.float64)
    expected, stats = per_group(bn, x, sizes)
    grad = torch.autograd.grad((expected * weights).sum(), x)[0]
    got = bn(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((got * weights).sum(), x)[0], grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.stack([bn.running_mean, bn.running_var]), stats, rtol=0, atol=1e-12)
    assert bn.num_batches_tracked == 1


def test_whole_batch_is_exactly_torch():
    x = torch.randn(MAPS)
    bn, mean, var = GroupedBatchNorm(5, 2), torch.zeros(5), torch.ones(5)
    expected = F.batch_norm(x, mean, var, bn.weight, bn.bias, True, 0.1, 1e-5)
    assert torch.equal(bn(x), expected)
    torch.testing.assert_close(torch.stack([bn.running_mean, bn.running_var]), torch.stack([mean, var]))


def test_evaluation_uses_running_statistics():
    bn = layer(1, group_size=2)
    bn(torch.randn(TOKENS, dtype=torch.float64))
    before = {k: v.clone() for k, v in bn.state_dict().items()}
    x = torch.randn(1, 1, 5, dtype=torch.float64)
    expected = (x - bn.running_mean) / (bn.running_var + 1e-5).sqrt() * bn.weight + bn.bias
    torch.testing.assert_close(bn.eval()(x), expected)
    assert all(torch.equal(v, before[k]) for k, v in bn.state_dict().items())


@pytest.mark.parametrize("affine", [True, False])
def test_state_dict_is_interchangeable_with_torch(affine):
    ours, theirs = GroupedBatchNorm(5, 2, affine=affine), nn.BatchNorm2d(5, affine=affine)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs(torch.randn(MAPS))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.running_var, theirs.running_var) and ours.num_batches_tracked == 1


def test_memory_format_stays():
    x = torch.randn(MAPS).contiguous(memory_format=torch.channels_last)
    for group_size in (0, 2):
        y = GroupedBatchNorm(5, 2, group_size=group_size)(x)
        assert y.is_contiguous(memory_format=torch.channels_last)


@given(st.integers(1, 60), st.integers(0, 70))
def test_group_sizes_cover_the_batch_without_a_lone_rest(batch, group_size):
    sizes = group_sizes(batch, group_size)
    assert sum(sizes) == batch
    if 1 < group_size < batch:
        assert all(size == group_size for size in sizes[:-1])
        assert 2 <= sizes[-1] <= group_size + 1


def test_set_bn_groups_reaches_every_layer():
    net = nn.Sequential(layer(2), nn.Sequential(layer(1)))
    set_bn_groups(net, 4)
    assert [m.group_size for m in net.modules() if isinstance(m, GroupedBatchNorm)] == [4, 4]
    with pytest.raises(ValueError, match=r"size must be 0 .*got -1"):
        set_bn_groups(net, -1)


@pytest.mark.parametrize(
    ("dims", "shape", "says"),
    [
        (1, (1, 1, 5), "two images or more.*1, 1, 5"),
        (2, (1, 5, 1, 1), "two images or more.*1, 5, 1, 1"),
        (2, (2, 4, 3, 3), r"\[B, 5, H, W\], got \[2, 4, 3, 3\]"),
        (2, (2, 5), r"\[B, 5, H, W\], got \[2, 5\]"),
        (1, (2, 5, 4), r"\[B, .., 5\], got \[2, 5, 4\]"),
    ],
)
def test_errors_say_what_came(dims, shape, says):
    with pytest.raises(ValueError, match=says):
        GroupedBatchNorm(5, dims)(torch.randn(shape))


def test_dims_are_checked():
    with pytest.raises(ValueError, match="dims must be 1"):
        GroupedBatchNorm(5, 3)


def network(layers: int = 3) -> nn.Sequential:
    """Norms of two sizes and momenta; the last one is passed twice as often."""
    torch.manual_seed(0)
    net = nn.Sequential(*(GroupedBatchNorm(c, 1, group_size=2) for c in [5] * layers), GroupedBatchNorm(5, 1)).double()
    net[0].momentum = 0.3
    return net


def passes(net: nn.Sequential, seed: int) -> None:
    """Two parts in one batch, then some more through the last layer alone."""
    torch.manual_seed(seed)
    with batch_norm_state(norms_of(net), passes=2):
        y = net(torch.randn(8, 3, 5, dtype=torch.float64) * 3 + 1)
    net[-1](y * 2)


def test_held_statistics_move_as_if_they_had_not_waited():
    now, later = network(), network()
    held = HeldStatistics(norms_of(later))
    start = {name: x.clone() for name, x in later.state_dict().items()}
    for seed in range(3):
        passes(now, seed)
        with held.held():
            passes(later, seed)
    assert all(torch.equal(x, start[name]) for name, x in later.state_dict().items())
    held.move(torch.tensor(True))
    for name, x in later.state_dict().items():
        assert torch.equal(x, now.state_dict()[name]), name
    held.move(torch.tensor(True))  # nothing is left to move by
    assert all(torch.equal(x, now.state_dict()[name]) for name, x in later.state_dict().items())
    passes(now, 3)
    passes(later, 3)
    assert all(torch.equal(x, now.state_dict()[name]) for name, x in later.state_dict().items())


def test_unwanted_statistics_are_dropped():
    net = network()
    held = HeldStatistics(norms_of(net))
    start = {name: x.clone() for name, x in net.state_dict().items()}
    with held.held():
        net(torch.full((8, 3, 5), float("nan"), dtype=torch.float64))
    held.move(torch.tensor(False))
    for name, x in net.state_dict().items():
        assert torch.equal(x, start[name]) or name.endswith("num_batches_tracked"), name


def test_no_layer_is_held_after_an_error():
    net = network()
    with pytest.raises(RuntimeError, match="stop"), HeldStatistics(norms_of(net)).held():
        passes(net, 0)
        raise RuntimeError("stop")
    assert not any(layer.held or layer.seen for layer in norms_of(net))


class Count(TorchDispatchMode):
    """Counts operations but for views."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not function.is_view
        return function(*args, **(kwargs or {}))


def test_no_more_operations_for_more_layers():
    counts = []
    for layers in (2, 30):
        net = network(layers)
        held = HeldStatistics(norms_of(net))
        with held.held():
            passes(net, 0)
        with Count() as count:
            held.move(torch.tensor(True))
        counts.append(count.number)
    assert counts[0] == counts[1] < 40


def test_held_layers_are_compiled_once():
    compiled = []
    net = GroupedBatchNorm(5, 1)
    net.compile(backend=lambda graph, _: compiled.append(1) or graph.forward)
    held, plain = HeldStatistics([net]), GroupedBatchNorm(5, 1)
    for seed in range(3):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
        with held.held():
            net(x)
        plain(x)
    held.move(torch.tensor(True))
    assert len(compiled) == 1 and not net.seen
    torch.testing.assert_close(net.running_var, plain.running_var)
