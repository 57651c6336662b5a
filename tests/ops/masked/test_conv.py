"""masked_conv2d and masked_max_pool2d: the oracle, the dense case, adjoints, poison."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rcmstr_fast import ops
from rcmstr_fast.ops import Sites
from tests.ops.cases import array, assert_near, cases, normal
from tests.oracles import sparse

conv_cases = cases("masked_conv2d")
pool_cases = cases("masked_max_pool2d")
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)

#: (name, input size, kernel, stride, padding) of the ResNet's layers.
CONVS = [
    ("same", (4, 7), (3, 3), (1, 1), (1, 1)),
    ("shortcut", (4, 7), (1, 1), (1, 1), (0, 0)),
    ("tail1", (4, 7), (2, 2), (2, 1), (0, 1)),
    ("tail2", (2, 8), (2, 2), (1, 1), (0, 0)),
]
POOLS = [("halve", (4, 6), (2, 2), (2, 2), (0, 0)), ("odd", (4, 5), (2, 2), (2, 1), (0, 1))]
convs = pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"), [c[1:] for c in CONVS], ids=[c[0] for c in CONVS]
)
pools = pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"), [p[1:] for p in POOLS], ids=[p[0] for p in POOLS]
)


def out_size(size, kernel, stride, padding):
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel, stride, padding))


def random_sites(batch, size, out, seed, device, share=0.4):
    """Independent random maps; image 0 is all hidden."""
    generator = torch.Generator().manual_seed(seed)
    source, active = (torch.rand(batch, 1, *s, generator=generator) < share for s in (size, out))
    if tuple(size) == tuple(out):
        source = active
    for found in (source, active):
        found[0] = False
    return Sites(active.to(device), source.to(device))


@conv_cases
@dtypes
@convs
def test_conv_matches_the_oracle(case, dtype, size, kernel, stride, padding):
    sites = random_sites(3, size, out_size(size, kernel, stride, padding), 0, case.device)
    x = normal(3, 4, *size, seed=1, dtype=dtype, device=case.device)
    weight = normal(5, 4, *kernel, seed=2, dtype=dtype, device=case.device)
    got = case(ops.masked_conv2d, x, weight, sites, stride=stride, padding=padding)
    maps = array(sites.source)[:, 0], array(sites.active)[:, 0]
    assert_near(got, sparse.conv2d(array(x), array(weight), *maps, stride, padding), dtype)
    assert (got.masked_select(~sites.active) == 0).all() and got.dtype == dtype


@conv_cases
@settings(max_examples=15, deadline=None)
@given(
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    k=st.integers(1, 3),
    s=st.integers(1, 2),
    p=st.integers(0, 1),
    c=st.integers(1, 3),
    o=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_conv_shapes(case, h, w, k, s, p, c, o, seed):
    h, w = max(h, k), max(w, k)
    out = out_size((h, w), (k, k), (s, s), (p, p))
    sites = random_sites(2, (h, w), out, seed, case.device, share=0.6)
    x, weight = (normal(*n, seed=seed, dtype=torch.float32, device=case.device) for n in ((2, c, h, w), (o, c, k, k)))
    got = case(ops.masked_conv2d, x, weight, sites, stride=s, padding=p)
    maps = array(sites.source)[:, 0], array(sites.active)[:, 0]
    assert_near(got, sparse.conv2d(array(x), array(weight), *maps, (s, s), (p, p)), torch.float32)


@conv_cases
@dtypes
@convs
def test_all_visible_is_the_dense_convolution(case, dtype, size, kernel, stride, padding):
    out = out_size(size, kernel, stride, padding)
    sites = Sites(*(torch.ones(2, 1, *n, dtype=torch.bool, device=case.device) for n in (out, size)))
    results = []
    for dense in (True, False):
        x = normal(2, 3, *size, seed=1, dtype=dtype, device=case.device).requires_grad_()
        weight = normal(4, 3, *kernel, seed=2, dtype=dtype, device=case.device).requires_grad_()
        if dense:
            y = F.conv2d(x, weight, stride=stride, padding=padding)
        else:
            y = case(ops.masked_conv2d, x, weight, sites, stride=stride, padding=padding)
        y.square().sum().backward()
        results.append((y, x.grad, weight.grad))
    for name, dense, masked in zip(("output", "grad_x", "grad_weight"), *results):
        assert_near(masked, dense, dtype, name)
        assert repr(case) != "reference-cpu" or torch.equal(masked, dense), name


@conv_cases
@dtypes
@convs
def test_adjoint_identities(case, dtype, size, kernel, stride, padding):
    """<conv(x), g> = <x, dgrad(g)> = <w, wgrad(g)>: the operation is linear in x and in w."""
    out = out_size(size, kernel, stride, padding)
    sites = random_sites(3, size, out, 3, case.device)
    x = normal(3, 4, *size, seed=1, dtype=dtype, device=case.device).requires_grad_()
    weight = normal(5, 4, *kernel, seed=2, dtype=dtype, device=case.device).requires_grad_()
    g = normal(3, 5, *out, seed=3, dtype=dtype, device=case.device)
    y = case(ops.masked_conv2d, x, weight, sites, stride=stride, padding=padding)
    y.backward(g)
    inner = (y.detach().double() * g.double()).sum()
    assert inner.abs() > 1e-3
    assert_near((x * x.grad).double().sum(), inner, dtype)
    assert_near((weight * weight.grad).double().sum(), inner, dtype)


def poison(x, active):
    return torch.where(active, x, torch.nan)


@conv_cases
@convs
def test_nan_at_hidden_sites_reaches_neither_output_nor_gradient(case, size, kernel, stride, padding):
    out = out_size(size, kernel, stride, padding)
    sites = random_sites(3, size, out, 3, case.device)
    results = []
    for poisoned in (False, True):
        x = normal(3, 4, *size, seed=1, dtype=torch.float32, device=case.device)
        x = (poison(x, sites.source) if poisoned else x).requires_grad_()
        weight = normal(5, 4, *kernel, seed=2, dtype=torch.float32, device=case.device).requires_grad_()
        g = normal(3, 5, *out, seed=3, dtype=torch.float32, device=case.device)
        y = case(ops.masked_conv2d, x, weight, sites, stride=stride, padding=padding)
        y.backward(poison(g, sites.active) if poisoned else g)
        assert (x.grad.masked_select(~sites.source) == 0).all()
        results.append((y, x.grad, weight.grad))
    for clean, dirty in zip(*results):
        assert torch.equal(clean, dirty)


@conv_cases
def test_conv_channels_last_and_autocast(case):
    sites = random_sites(3, (4, 7), (4, 7), 3, case.device)
    x = normal(3, 16, 4, 7, seed=1, dtype=torch.float32, device=case.device)
    weight = normal(8, 16, 3, 3, seed=2, dtype=torch.float32, device=case.device)
    expected = case(ops.masked_conv2d, x, weight, sites, padding=1)
    nhwc = case(ops.masked_conv2d, x.to(memory_format=torch.channels_last), weight, sites, padding=1)
    assert nhwc.is_contiguous(memory_format=torch.channels_last)
    assert_near(nhwc, expected, torch.float32)
    with torch.autocast(case.device, dtype=torch.bfloat16):
        low = case(ops.masked_conv2d, x, weight, sites, padding=1)
    assert low.dtype == torch.bfloat16
    assert_near(low, expected, torch.bfloat16)


@pool_cases
@dtypes
@pools
def test_pool_matches_the_oracle_and_ignores_poison(case, dtype, size, kernel, stride, padding):
    out = out_size(size, kernel, stride, padding)
    sites = random_sites(4, size, out, 0, case.device)
    x = normal(4, 3, *size, seed=1, dtype=dtype, device=case.device) - 5  # zeros would win if they counted
    options = {"kernel_size": kernel, "stride": stride, "padding": padding}
    got = case(ops.masked_max_pool2d, poison(x, sites.source), sites, **options)
    maps = array(sites.source)[:, 0], array(sites.active)[:, 0]
    assert_near(got, sparse.max_pool2d(array(x), *maps, kernel, stride, padding), dtype)
    assert (array(got) == 0).any() and np.isfinite(array(got)).all()


@pool_cases
@pools
def test_pool_gradient(case, size, kernel, stride, padding):
    """The gradient goes to the largest active input of each window that has one, and nowhere else."""
    out = out_size(size, kernel, stride, padding)
    sites = random_sites(4, size, out, 0, case.device)
    options = {"kernel_size": kernel, "stride": stride, "padding": padding}
    x = normal(4, 3, *size, seed=1, dtype=torch.float64, device=case.device) - 5
    dirty = poison(x, sites.source).requires_grad_()
    y = case(ops.masked_max_pool2d, dirty, sites, **options)
    y.backward(poison(torch.ones_like(y), sites.active))
    assert dirty.grad.sum() == (y != 0).sum()
    assert (dirty.grad.masked_select(~sites.source) == 0).all()
    clean = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: case(ops.masked_max_pool2d, x, sites, **options), (clean,))


@pool_cases
@pools
def test_pool_all_visible_is_dense(case, size, kernel, stride, padding):
    out = out_size(size, kernel, stride, padding)
    sites = Sites(*(torch.ones(2, 1, *n, dtype=torch.bool, device=case.device) for n in (out, size)))
    x = normal(2, 3, *size, seed=1, dtype=torch.float32, device=case.device)
    got = case(ops.masked_max_pool2d, x, sites, kernel_size=kernel, stride=stride, padding=padding)
    assert torch.equal(got, F.max_pool2d(x, kernel, stride, padding))


SITES = Sites(torch.ones(2, 1, 4, 8, dtype=torch.bool), torch.ones(2, 1, 8, 7, dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.masked_conv2d(torch.zeros(2, 3, 4), torch.zeros(5, 3, 1, 1), SITES),
            ValueError,
            "masked_conv2d: x must be [B, C, h, w], got [2, 3, 4]",
        ),
        (
            lambda: ops.masked_conv2d(torch.zeros(2, 3, 4, 8), torch.zeros(5, 4, 1, 1), SITES),
            ValueError,
            "masked_conv2d: weight must be [O, 3, kh, kw] like x, got [5, 4, 1, 1]",
        ),
        (
            lambda: ops.masked_conv2d(torch.zeros(2, 3, 4, 8), torch.zeros(5, 3, 3, 3), SITES),
            ValueError,
            "masked_conv2d: sites.active must be [2, 1, 2, 6] like the output, got [2, 1, 4, 8]",
        ),
        (
            lambda: ops.masked_conv2d(torch.zeros(2, 3, 8, 9), torch.zeros(5, 3, 2, 2), SITES, stride=(2, 1)),
            ValueError,
            "masked_conv2d: sites.source must be [2, 1, 8, 9] like x, got [2, 1, 8, 7]",
        ),
        (
            lambda: ops.masked_conv2d(
                torch.zeros(2, 3, 8, 9), torch.zeros(5, 3, 2, 2), Sites(SITES.active, None), stride=(2, 1)
            ),
            TypeError,
            "masked_conv2d: sites.source must be a tensor [2, 1, 8, 9], got NoneType",
        ),
        (
            lambda: ops.masked_conv2d(torch.zeros(2, 3, 4, 8), torch.zeros(5, 3, 1, 1), SITES, stride=0),
            ValueError,
            "masked_conv2d: kernel and stride must be 1 or more and padding 0 or more, got (1, 1), 0, 0",
        ),
        (
            lambda: ops.masked_conv2d(torch.zeros(2, 3, 2, 2), torch.zeros(5, 3, 3, 3), SITES),
            ValueError,
            "masked_conv2d: x must be at least as large as the kernel (3, 3), got [2, 3, 2, 2]",
        ),
        (
            lambda: ops.masked_conv2d(torch.zeros(2, 3, 4, 8), torch.zeros(5, 3, 1, 1, device="meta"), SITES),
            ValueError,
            "masked_conv2d: weight must be on cpu like x, got meta",
        ),
        (
            lambda: ops.masked_max_pool2d(torch.zeros(2, 3, 8, 7), SITES, kernel_size=2, stride=2, padding=2),
            ValueError,
            "masked_max_pool2d: padding must be at most half of 2, got 2",
        ),
        (
            lambda: ops.masked_max_pool2d(torch.zeros(2, 3, 8, 7).int(), SITES, kernel_size=2, stride=2),
            TypeError,
            "masked_max_pool2d: x must be a floating-point tensor [B, C, h, w], got torch.int32",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
