"""masked_conv_norm is masked_batch_norm of masked_conv2d, on every backend and storage."""

import pytest
import torch
import torch.nn.functional as F

from rcmstr_fast import ops
from rcmstr_fast.ops import CastWeight, Sites
from tests.ops.cases import assert_near, cases, normal
from tests.ops.masked.test_conv import out_size, random_sites

all_cases = cases("masked_conv_norm")
NAMES = ("x", "weight", "norm_weight", "norm_bias", "residual")


def tensors(sites, size, kernel, dtype, device):
    kwargs = {"dtype": dtype, "device": device}
    out = (len(sites.active), 6, *sites.active.shape[2:])
    made = [normal(len(sites.active), 4, *size, seed=1, **kwargs), normal(6, 4, *kernel, seed=2, **kwargs)]
    made += [normal(6, seed=3, **kwargs), normal(6, seed=4, **kwargs), normal(*out, seed=5, **kwargs)]
    return [t.requires_grad_() for t in made]


def composed(x, weight, sites, norm_weight, norm_bias, *, stride, padding, **options):
    y = ops.masked_conv2d(x, weight, sites, stride=stride, padding=padding, backend="reference")
    return ops.masked_batch_norm(y, norm_weight, norm_bias, sites, backend="reference", **options)


@all_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [
        ((4, 7), (3, 3), (1, 1), (1, 1)),
        ((4, 7), (2, 2), (2, 1), (0, 1)),
    ],
)
def test_equals_its_two_parts(case, dtype, group_size, size, kernel, stride, padding):
    sites = random_sites(5, size, out_size(size, kernel, stride, padding), 3, case.device)
    mine, theirs = (tensors(sites, size, kernel, dtype, case.device) for _ in range(2))
    options = {"stride": stride, "padding": padding, "relu": True, "group_size": group_size}
    got = case(ops.masked_conv_norm, *mine[:2], sites, *mine[2:4], residual=mine[4], **options)
    expected = composed(*theirs[:2], sites, *theirs[2:4], residual=theirs[4], **options)
    g = normal(*got.shape, seed=6, dtype=dtype, device=case.device)
    got.backward(g)
    expected.backward(g)
    assert_near(got, expected, dtype, "output")
    for name, a, b in zip(NAMES, mine, theirs):
        assert_near(a.grad, b.grad, dtype, f"gradient of {name}")


@all_cases
def test_all_visible_is_the_dense_layer(case):
    sites = Sites(torch.ones(3, 1, 4, 7, dtype=torch.bool, device=case.device), None)
    x, weight, scale, shift, _ = tensors(sites, (4, 7), (3, 3), torch.float32, case.device)
    got = case(ops.masked_conv_norm, x, weight, sites, scale, shift, padding=1)
    expected = F.batch_norm(F.conv2d(x, weight, padding=1), None, None, scale, shift, training=True)
    assert_near(got, expected, torch.float32)


@all_cases
@pytest.mark.parametrize("hidden", [True, False])
def test_a_weight_that_was_cast_before(case, hidden):
    """Under autocast the copy is multiplied with, and every gradient arrives at `full` or at `low`."""
    sites = random_sites(3, (4, 7), (4, 7), 3, case.device)
    if not hidden:
        sites = Sites(torch.ones_like(sites.active), None)
    x, weight, scale, shift, _ = tensors(sites, (4, 7), (3, 3), torch.float32, case.device)
    full, low = weight.detach().clone().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    with torch.autocast(case.device, torch.bfloat16):
        plain = case(ops.masked_conv_norm, x, weight, sites, scale, shift, padding=1)
        cast = case(ops.masked_conv_norm, x, CastWeight(full, low), sites, scale, shift, padding=1)
        alone = case(ops.masked_conv2d, x, CastWeight(full, low), sites, padding=1)
    assert torch.equal(plain, cast) and alone.dtype == torch.bfloat16
    g = normal(*plain.shape, seed=6, dtype=plain.dtype, device=case.device)
    plain.backward(g)
    cast.backward(g)
    given = [t.grad for t in (full, low) if t.grad is not None]
    assert len(given) == 1 and torch.equal(given[0].float(), weight.grad)
    assert (low.grad is None) == (case.backend != "reference")


@pytest.mark.parametrize("group_size", [None, 2])
def test_packed_stages_keep_rows(group_size):
    sites = random_sites(4, (4, 7), (4, 7), 3, "cpu")
    (stored,) = ops.masked_storage([Sites(sites.active, None)], backend="reference")
    x, weight, scale, shift, residual = tensors(sites, (4, 7), (3, 3), torch.float32, "cpu")
    options = {"padding": 1, "residual": residual, "group_size": group_size}
    expected = ops.masked_conv_norm(x, weight, stored, scale, shift, **options)
    try:
        (packed,) = ops.masked_storage([Sites(sites.active, None)], backend="cpp")
    except ops.dispatch.BackendError as error:
        pytest.skip(str(error))
    rows = ops.masked_conv_norm(x, weight, packed, scale, shift, **options)
    assert rows.shape == (int(sites.active.sum()), 6)
    assert_near(ops.unpack_sites(rows, packed), expected, torch.float32)


SITES = Sites(torch.ones(2, 1, 4, 8, dtype=torch.bool), None)
X, WEIGHT, ONES = torch.zeros(2, 3, 4, 8), torch.zeros(5, 3, 1, 1), torch.ones(5)


@pytest.mark.parametrize(
    ("arguments", "changes", "error", "message"),
    [
        (
            (X, torch.zeros(5, 4, 1, 1), SITES, ONES, ONES),
            {},
            ValueError,
            "weight must be [O, 3, kh, kw] like x, got [5, 4, 1, 1]",
        ),
        (
            (X, WEIGHT, SITES, torch.ones(3), ONES),
            {},
            ValueError,
            "norm_weight must be [5] like the outputs of weight, got [3]",
        ),
        (
            (X, WEIGHT, SITES, ONES, ONES.int()),
            {},
            TypeError,
            "norm_bias must be a floating-point tensor [5], got torch.int32",
        ),
        (
            (X, WEIGHT, SITES, ONES, ONES),
            {"residual": X},
            ValueError,
            "residual must be [2, 5, 4, 8] like the result, got [2, 3, 4, 8]",
        ),
        ((X, WEIGHT, SITES, ONES, ONES), {"eps": 0.0}, ValueError, "eps must be above 0, got 0.0"),
        ((X, WEIGHT, SITES, ONES, ONES), {"group_size": 0}, ValueError, "group_size must be above 0, got 0"),
        ((X, WEIGHT, SITES, ONES, ONES.to("meta")), {}, ValueError, "norm_bias must be on cpu like x, got meta"),
    ],
)
def test_bad_arguments(arguments, changes, error, message):
    with pytest.raises(error) as caught:
        ops.masked_conv_norm(*arguments, **changes)
    assert str(caught.value) == f"masked_conv_norm: {message}"
