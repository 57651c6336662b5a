"""masked_batch_norm against torch.nn.BatchNorm1d on the gathered active rows."""

import pytest
import torch
from torch import nn

from rcmstr_fast import ops
from rcmstr_fast.ops import Sites
from tests.ops.cases import assert_near, cases, normal

all_cases = cases("masked_batch_norm")
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
options = pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
NAMES = ("x", "residual", "weight", "bias")


def tensors(case, dtype, shape=(5, 6, 3, 4)):
    """x with a mean away from 0, residual, weight, bias; fresh leaves."""
    kwargs = {"dtype": dtype, "device": case.device}
    return [
        (3 * normal(*shape, seed=1, **kwargs) + 2).requires_grad_(),
        normal(*shape, seed=2, **kwargs).requires_grad_(),
        normal(shape[1], seed=3, **kwargs).requires_grad_(),
        normal(shape[1], seed=4, **kwargs).requires_grad_(),
    ]


def some_sites(case, shape=(5, 6, 3, 4), share=0.4):
    active = torch.rand(shape[0], 1, *shape[2:], generator=torch.Generator().manual_seed(0)) < share
    return Sites(active.to(case.device), None)


def gathered(x, residual, weight, bias, active, relu, group_size):
    """BatchNorm1d in training mode on the active rows of each group, scattered back."""
    norm = nn.BatchNorm1d(x.shape[1], device=x.device, dtype=x.dtype)
    norm.weight.data.fill_(1)
    out = torch.zeros_like(x).movedim(1, -1)
    starts = [0] if len(x) <= group_size else list(range(0, len(x), group_size))
    if len(starts) > 1 and group_size > 1 and len(x) % group_size == 1:
        starts.pop()  # a lone image joins the group before
    for start, end in zip(starts, [*starts[1:], len(x)]):
        here = torch.zeros_like(active[:, 0])
        here[start:end] = active[start:end, 0]
        rows = norm(x.movedim(1, -1)[here]) * weight + bias + residual.movedim(1, -1)[here]
        out = out.masked_scatter(here[..., None].expand_as(out), rows.relu() if relu else rows)
    return out.movedim(-1, 1)


def check_gradients(mine, theirs, dtype):
    for name, a, b in zip(NAMES, mine, theirs):
        assert_near(a.grad, b.grad, dtype, f"gradient of {name}")


@all_cases
@dtypes
@options
@pytest.mark.parametrize("group_size", [5, 2, 1])
def test_matches_batch_norm_on_gathered_rows(case, dtype, relu, group_size):
    mine, theirs, sites = tensors(case, dtype), tensors(case, dtype), some_sites(case)
    x, residual, weight, bias = mine
    got = case(ops.masked_batch_norm, x, weight, bias, sites, residual=residual, relu=relu, group_size=group_size)
    expected = gathered(*theirs, sites.active, relu, group_size)
    g = normal(*got.shape, seed=5, dtype=dtype, device=case.device)
    got.backward(g)
    expected.backward(g)
    assert_near(got, expected, dtype, "output")
    assert (got.masked_select(~sites.active) == 0).all() and got.dtype == dtype
    check_gradients(mine, theirs, dtype)


@all_cases
@dtypes
def test_all_visible_is_batch_norm_2d(case, dtype):
    x, _, weight, bias = tensors(case, dtype)
    y, _, _, _ = tensors(case, dtype)
    norm = nn.BatchNorm2d(6, device=case.device, dtype=dtype)
    norm.weight.data, norm.bias.data = weight.detach().clone(), bias.detach().clone()
    sites = Sites(torch.ones(5, 1, 3, 4, dtype=torch.bool, device=case.device), None)
    got, expected = case(ops.masked_batch_norm, x, weight, bias, sites), norm(y)
    got.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    for a, b in ((got, expected), (x.grad, y.grad), (weight.grad, norm.weight.grad), (bias.grad, norm.bias.grad)):
        assert_near(a, b, dtype)


@all_cases
def test_gradcheck(case):
    sites = some_sites(case)

    def run(x, residual, weight, bias):
        return case(ops.masked_batch_norm, x, weight, bias, sites, residual=residual, group_size=2)

    assert torch.autograd.gradcheck(run, tensors(case, torch.float64))


@all_cases
@options
def test_nan_at_hidden_sites_reaches_nothing(case, relu):
    sites, results = some_sites(case), []
    for poisoned in (False, True):
        leaves = tensors(case, torch.float32)
        if poisoned:
            for leaf in leaves[:2]:
                leaf.data.masked_fill_(~sites.active, torch.nan)
        x, residual, weight, bias = leaves
        y = case(ops.masked_batch_norm, x, weight, bias, sites, residual=residual, relu=relu, group_size=2)
        g = normal(*y.shape, seed=5, dtype=torch.float32, device=case.device)
        y.backward(g.masked_fill(~sites.active, torch.nan) if poisoned else g)
        results.append((y, *(leaf.grad for leaf in leaves)))
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty) and dirty.isfinite().all()


@all_cases
def test_groups_without_sites_and_with_one(case):
    x, residual, weight, bias = tensors(case, torch.float32)
    active = torch.zeros(5, 1, 3, 4, dtype=torch.bool, device=case.device)
    active[4, 0, 1, 2] = True
    y = case(ops.masked_batch_norm, x, weight, bias, Sites(active, None), residual=residual, group_size=2)
    assert (y[:4] == 0).all()
    assert_near(y[4, :, 1, 2], bias + residual[4, :, 1, 2], torch.float32)
    y.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (x, residual, weight, bias))
    assert x.grad.abs().max() < 1e-3 and (residual.grad[:4] == 0).all()
    empty = case(ops.masked_batch_norm, x[:0], weight, bias, Sites(active[:0], None))
    assert empty.shape == (0, 6, 3, 4)


@all_cases
def test_half_precision_input_keeps_its_dtype(case):
    x, residual, weight, bias = (t.detach() for t in tensors(case, torch.float32))
    sites = some_sites(case)
    low, kept = x.bfloat16(), residual.bfloat16()
    y = case(ops.masked_batch_norm, low, weight, bias, sites, residual=kept, relu=True)
    wide = case(ops.masked_batch_norm, low.float(), weight, bias, sites, residual=kept.float(), relu=True)
    assert y.dtype == torch.bfloat16
    assert_near(y, wide.bfloat16(), torch.bfloat16)


ONES = torch.ones(6)
SITES = Sites(torch.ones(5, 1, 3, 4, dtype=torch.bool), None)


@pytest.mark.parametrize(
    ("arguments", "changes", "error", "message"),
    [
        ((torch.zeros(5, 6, 12), ONES, ONES, SITES), {}, ValueError, "x must be [B, C, h, w], got [5, 6, 12]"),
        (
            (torch.zeros(5, 6, 3, 4), ONES[:5], ONES, SITES),
            {},
            ValueError,
            "weight must be [6] like the channels of x, got [5]",
        ),
        (
            (torch.zeros(5, 6, 3, 4), ONES, ONES.int(), SITES),
            {},
            TypeError,
            "bias must be a floating-point tensor [6], got torch.int32",
        ),
        (
            (torch.zeros(5, 6, 3, 5), ONES, ONES, SITES),
            {},
            ValueError,
            "sites.active must be [5, 1, 3, 5] like x, got [5, 1, 3, 4]",
        ),
        (
            (torch.zeros(5, 6, 3, 4), ONES, ONES, SITES),
            {"residual": torch.zeros(5, 6, 3, 1)},
            ValueError,
            "residual must be [5, 6, 3, 4] like x, got [5, 6, 3, 1]",
        ),
        ((torch.zeros(5, 6, 3, 4), ONES, ONES, SITES), {"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
        (
            (torch.zeros(5, 6, 3, 4), ONES, ONES, SITES),
            {"group_size": 0},
            ValueError,
            "group_size must be above 0, got 0",
        ),
        (
            (torch.zeros(5, 6, 3, 4, device="meta"), ONES, ONES, SITES),
            {},
            ValueError,
            "weight must be on meta like x, got cpu",
        ),
    ],
)
def test_bad_arguments(arguments, changes, error, message):
    with pytest.raises(error) as caught:
        ops.masked_batch_norm(*arguments, **changes)
    assert str(caught.value) == f"masked_batch_norm: {message}"
