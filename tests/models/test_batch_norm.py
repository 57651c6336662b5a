import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rcmstr_fast.models.batch_norm import GroupedBatchNorm, group_sizes, set_bn_groups

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


@pytest.mark.parametrize(("dims", "shape", "says"), [
    (1, (1, 1, 5), "two images or more.*1, 1, 5"),
    (2, (1, 5, 1, 1), "two images or more.*1, 5, 1, 1"),
    (2, (2, 4, 3, 3), r"\[B, 5, H, W\], got \[2, 4, 3, 3\]"),
    (2, (2, 5), r"\[B, 5, H, W\], got \[2, 5\]"),
    (1, (2, 5, 4), r"\[B, .., 5\], got \[2, 5, 4\]"),
])  # fmt: skip
def test_errors_say_what_came(dims, shape, says):
    with pytest.raises(ValueError, match=says):
        GroupedBatchNorm(5, dims)(torch.randn(shape))


def test_dims_are_checked():
    with pytest.raises(ValueError, match="dims must be 1"):
        GroupedBatchNorm(5, 3)
