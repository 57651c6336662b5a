"""Convolution and batch norm as one Triton operation: statistics from tiles, and the map between the two."""

import pytest
import torch

from rcmstr_fast import ops
from rcmstr_fast.models.resnet import ConvBN, Stage
from rcmstr_fast.ops import Sites, triton_backend
from rcmstr_fast.ops.masked import lists as site_lists
from rcmstr_fast.ops.masked import maps, triton
from rcmstr_fast.ops.masked.layers import Window
from tests.kernels.masked.test_kernels import dtypes, layer_sites, normal
from tests.kernels.rows import DEVICE

pytest.importorskip("triton")

#: (in, out channels, input size, kernel, stride, padding): even and odd channel tiles, the three window forms.
LAYERS = [
    (64, 64, (4, 13), (3, 3), (1, 1), (1, 1)),
    (12, 40, (4, 7), (3, 3), (1, 1), (1, 1)),
    (64, 32, (4, 13), (2, 2), (2, 1), (0, 1)),
]
layers = pytest.mark.parametrize(("channels", "outputs", "size", "kernel", "stride", "padding"), LAYERS)
WINDOW = [3, 3, 1, 1, 1, 1]
NAMES = ("output", "grad_x", "grad_weight", "grad_norm_weight", "grad_norm_bias", "grad_residual")


def tensors(channels, outputs, size, kernel, sites, dtype):
    """x, weight, norm weight and bias, residual, gradient; the convolution's results lie 8 deviations away from 0."""
    batch, out = sites.active.shape[0], sites.active.shape[2:]
    x, weight = normal(batch, channels, *size, seed=1) + 1, normal(outputs, channels, *kernel, seed=2) / 8
    norm = [normal(outputs, seed=s) for s in (3, 4)]
    residual, g = (normal(batch, outputs, *out, seed=s) for s in (5, 6))
    return [x.to(dtype), weight.to(dtype), *norm, residual.to(dtype), g.to(dtype)]


def unit(given, sites, stride, padding, backend, *, relu=True, group_size=None):
    """Results of the operation and every gradient."""
    x, weight, norm_weight, norm_bias, residual = leaves = [t.detach().clone().requires_grad_() for t in given[:5]]
    y = ops.masked_conv_norm(
        x,
        weight,
        sites,
        norm_weight,
        norm_bias,
        stride=stride,
        padding=padding,
        residual=residual,
        relu=relu,
        group_size=group_size,
        backend=backend,
    )
    y.backward(given[5])
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def poison_between(monkeypatch):
    """What the operation only allocates holds NaN: nothing may read it before it is written."""
    empty = maps.empty
    monkeypatch.setattr(maps, "empty", lambda *a: empty(*a).fill_(torch.nan))


@dtypes
@layers
def test_against_float64_with_poison(monkeypatch, channels, outputs, size, kernel, stride, padding, dtype):
    """Worst element of the output and every gradient: at most twice that of the dense layers in the same dtype."""
    sites = layer_sites(size, kernel, stride, padding)
    given = tensors(channels, outputs, size, kernel, sites, dtype)
    dirty = list(given)
    dirty[0] = torch.where(sites.source, given[0], torch.nan)
    for place in (4, 5):
        dirty[place] = torch.where(sites.active, given[place], torch.nan)
    exact = unit([t.double() for t in given], sites, stride, padding, "reference", relu=False)
    dense = unit(given, sites, stride, padding, "reference", relu=False)
    poison_between(monkeypatch)
    ours = unit(dirty, sites, stride, padding, "triton", relu=False)
    for what, a, b, c in zip(NAMES, exact, dense, ours):
        worst, allowed = float((c - a).abs().max()), float((b - a).abs().max())
        # The interpreter cuts fp32 to bf16 where hardware rounds to nearest: up to twice the error.
        slack = 2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1
        assert worst <= slack * 2 * allowed + 1e-5 * float(a.abs().max()), f"{what}: {worst:.3g}, dense {allowed:.3g}"


@layers
def test_equals_the_two_operations_and_repeats_bitwise(channels, outputs, size, kernel, stride, padding):
    """Same convolution bit for bit; the norm to the rounding of sums in another order. Again: the same bits."""
    sites = layer_sites(size, kernel, stride, padding)
    given = tensors(channels, outputs, size, kernel, sites, torch.float16)
    x, weight, norm_weight, norm_bias, residual = (t.detach().clone().requires_grad_() for t in given[:5])
    y = ops.masked_conv2d(x, weight, sites, stride=stride, padding=padding, backend="triton")
    y = ops.masked_batch_norm(y, norm_weight, norm_bias, sites, residual=residual, relu=True, backend="triton")
    y.backward(given[5])
    ours, again = (unit(given, sites, stride, padding, "triton") for _ in range(2))
    theirs = [y.detach(), *(leaf.grad for leaf in (x, weight, norm_weight, norm_bias, residual))]
    for what, a, b, c in zip(NAMES, theirs, ours, again):
        assert torch.equal(b, c), what
        assert float((b - a).abs().max()) <= 4e-3 * float(a.abs().max()), what
    grouped = [unit(given, sites, stride, padding, backend, group_size=2) for backend in ("triton", "reference")]
    for what, a, b in zip(NAMES, *grouped):
        assert float((b - a).abs().max()) <= 1e-2 * float(b.abs().max()), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 300])
def test_statistics_are_those_of_the_stored_values(rows, dtype):
    """Counts around a tile of rows, none too: mean and deviation of the rounded results; tiles behind are not read."""
    active = torch.zeros(320, dtype=torch.bool)
    active[torch.randperm(320, generator=torch.Generator().manual_seed(0))[:rows]] = True
    active = active.view(2, 1, 10, 16).to(DEVICE)
    lists = site_lists.window_lists(active, active, Window((3, 3), (1, 1), (1, 1)))
    x, weight = (normal(2, 16, 10, 16, seed=1) + 3).to(dtype), (normal(24, 16, 3, 3, seed=2) / 8).to(dtype)
    scale, shift = normal(24, seed=3), normal(24, seed=4)
    x = x.contiguous(memory_format=torch.channels_last)
    _, y, mean, rstd, count = triton._conv_norm(
        x, weight, weight.float(), [scale, shift], None, active, list(lists), WINDOW, [2], 1e-5, False, True
    )
    values = y.movedim(1, -1)[active[:, 0]].double()
    assert float(count) == rows
    if rows:
        scatter = values.std(0, correction=0)
        assert float((mean[0] - values.mean(0)).abs().max()) <= 2e-6 * float(values.abs().max())
        expected = (scatter**2 + 1e-5).rsqrt()
        assert float((rstd[0] / expected - 1).abs().max()) <= (1e-4 if rows > 1 else 1e-2)
    assert bool(mean.isfinite().all()) and bool(rstd.isfinite().all())


def test_many_tiles_are_combined(monkeypatch):
    """More tiles than one block of the combination holds, the last block not full."""
    from rcmstr_fast.kernels.masked import norm

    monkeypatch.setattr(norm, "MOMENTS_P", 2)
    sites = Sites(torch.ones(2, 1, 4, 37, dtype=torch.bool, device=DEVICE), None)  # 10 tiles of 32 rows in float32
    given = tensors(8, 24, (4, 37), (3, 3), sites, torch.float32)
    ours, dense = (unit(given, sites, 1, 1, backend, relu=False) for backend in ("triton", "reference"))
    for what, a, b in zip(NAMES, dense, ours):
        assert float((b - a).abs().max()) <= 1e-4 * float(a.abs().max()), what


def test_opcheck_and_compile():
    sites = layer_sites((4, 7), (3, 3), (1, 1), (1, 1), batch=3)
    x, weight, scale, shift, residual, _ = tensors(16, 24, (4, 7), (3, 3), sites, torch.float16)
    lists = site_lists.window_lists(sites.source, sites.active, Window((3, 3), (1, 1), (1, 1)))
    x, full, scale, shift, residual = (t.requires_grad_() for t in (x, weight.float(), scale, shift, residual))
    given = sites.active, list(lists), WINDOW, [3], 1e-5, True
    arguments = (x, weight, full, [scale, shift], residual, *given, False)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(triton._conv_norm, arguments, test_utils=tests)

    def run(x, full):
        out = triton._conv_norm(x, weight, full, [scale, shift], None, *given, True)[0]
        return out.float().square().sum()

    grads = [torch.autograd.grad(f(x, full), (x, full)) for f in (run, torch.compile(run, backend="aot_eager"))]
    for eager, compiled in zip(*grads):
        assert torch.equal(eager, compiled) and float(eager.abs().max()) > 0


@pytest.mark.parametrize("chosen", [(True, False), (False, True)], ids=["lists, dense", "dense, lists"])
def test_stages_of_both_kinds_follow_each_other(monkeypatch, chosen):
    """Nothing that layers over lists leave open, in maps and gradients, gets into a dense stage before or after."""
    poison_between(monkeypatch)
    monkeypatch.setattr(triton_backend, "avoid_on_cpu", list)
    grid = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.5
    plain = ops.active_sites(grid, [(4, 6), (2, 3)])
    results = []
    for kinds in ((False, False), chosen):
        torch.manual_seed(0)
        stages = [Stage([ConvBN(3, 8)]), Stage([ConvBN(8, 16), ConvBN(16, 16)], pool=((2, 2), (0, 0)))]
        sites = [site_lists.ListSites.make(s) if kind else s for s, kind in zip(plain, kinds)]
        x = normal(2, 3, 4, 6, seed=1).to(memory_format=torch.channels_last)
        for stage, at in zip(stages, sites):
            x = stage.to(DEVICE)(x, at)
        out = ops.unpack_sites(x, sites[-1])
        out.pow(3).sum().backward()
        results.append([out.detach(), *(p.grad for stage in stages for p in stage.parameters())])
    assert float(results[0][0].abs().max()) > 0
    for a, b in zip(*results):
        assert float((b - a).abs().max()) <= 1e-3 * float(a.abs().max()) + 1e-6
