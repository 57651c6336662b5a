"""The masked kernels against float64, with poison where nothing may be read or written, at awkward sizes."""

import pytest
import torch

from rcmstr_fast import ops
from rcmstr_fast.models.resnet import ResNet29
from rcmstr_fast.ops import Sites, native
from rcmstr_fast.ops.masked import lists as site_lists
from rcmstr_fast.ops.masked import maps as memory
from rcmstr_fast.ops.masked import triton, triton_pool
from rcmstr_fast.ops.masked.layers import Window
from tests.kernels.rows import DEVICE

pytest.importorskip("triton")
from rcmstr_fast.kernels.architectures import FAMILIES
from rcmstr_fast.kernels.masked import conv as masked_conv
from rcmstr_fast.kernels.masked import norm as masked_norm
from rcmstr_fast.kernels.masked import pool as masked_pool
from rcmstr_fast.kernels.masked import tiles as masked_tiles

#: (in, out channels, input size, kernel, stride, padding) of the ResNet's layers, small; odd and even channel tiles.
LAYERS = [
    (3, 16, (8, 12), (3, 3), (1, 1), (1, 1)),
    (64, 64, (4, 26), (3, 3), (1, 1), (1, 1)),
    (40, 24, (4, 7), (3, 3), (1, 1), (1, 1)),
    (32, 64, (8, 5), (1, 1), (1, 1), (0, 0)),
    (64, 64, (4, 26), (2, 2), (2, 1), (0, 1)),
    (64, 64, (2, 27), (2, 2), (1, 1), (0, 0)),
]
layers = pytest.mark.parametrize(("channels", "outputs", "size", "kernel", "stride", "padding"), LAYERS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def maps(*sizes, batch=4, share=0.35):
    """Image 0 hidden, image 1 with one visible site, then random."""
    made = []
    for seed, size in enumerate(sizes):
        active = torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(seed)) < share
        active[:2] = False
        active[1, 0, size[0] // 2, size[1] // 2] = True
        made.append(active.to(DEVICE))
    return made


def layer_sites(size, kernel, stride, padding, **options):
    out = Window(kernel, stride, padding).output_size(size)
    source, active = maps(size, out, **options)
    return Sites(source if size == out else active, source)


def conv(x, weight, g, sites, stride, padding, backend):
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    y = ops.masked_conv2d(x, weight, sites, stride=stride, padding=padding, backend=backend)
    y.backward(g)
    return y.detach(), x.grad, weight.grad


@dtypes
@layers
def test_convolution_against_float64_with_poison(channels, outputs, size, kernel, stride, padding, dtype):
    """Worst element of the output and both gradients: at most twice that of the dense layer in the same dtype."""
    sites = layer_sites(size, kernel, stride, padding)
    x, weight = normal(4, channels, *size, seed=1).to(dtype), normal(outputs, channels, *kernel, seed=2).to(dtype) / 8
    g = normal(4, outputs, *sites.active.shape[2:], seed=3).to(dtype)
    dirty, dirty_g = torch.where(sites.source, x, torch.nan), torch.where(sites.active, g, torch.nan)
    exact = conv(x.double(), weight.double(), g.double(), sites, stride, padding, "reference")
    dense = conv(x, weight, g, sites, stride, padding, "reference")
    ours = conv(dirty, weight, dirty_g, sites, stride, padding, "triton")
    for what, a, b, c in zip(("output", "grad_x", "grad_weight"), exact, dense, ours):
        assert c.dtype == dtype and c.shape == a.shape
        worst, allowed = float((c - a).abs().max()), float((b - a).abs().max())
        # The interpreter cuts fp32 to bf16 where hardware rounds to nearest: up to twice the error.
        slack = 2 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1
        assert worst <= slack * 2 * allowed + 1e-6 * float(a.abs().max()), f"{what}: {worst:.3g}, dense {allowed:.3g}"


@layers
def test_rows_outside_the_lists_are_not_written(channels, outputs, size, kernel, stride, padding):
    sites = layer_sites(size, kernel, stride, padding)
    lists = site_lists.window_lists(sites.source, sites.active, Window(kernel, stride, padding))
    weight = normal(outputs, channels, *kernel, seed=2).half()
    for transposed, x_size, out_size, active in (
        (False, (channels, *size), (outputs, *sites.active.shape[2:]), sites.active),
        (True, (outputs, *sites.active.shape[2:]), (channels, *size), sites.source),
    ):
        x = normal(4, *x_size, seed=1).half().contiguous(memory_format=torch.channels_last)
        out = torch.full((4, *out_size), 7.0, dtype=torch.float16, device=DEVICE)
        out = out.contiguous(memory_format=torch.channels_last)
        rows = lists[3:6] if transposed else lists[:3]
        masked_conv.masked_conv(x, weight, rows, out, (*kernel, *stride, *padding), transposed=transposed)
        inactive = ~active.expand_as(out)
        assert bool((out[inactive] == 7).all()) and bool(torch.isfinite(out).all())
        assert bool((out[~inactive] != 7).any())


@layers
def test_lists(channels, outputs, size, kernel, stride, padding):
    """Words, order, count and pairs say for every output which active input lies under each tap, and the reverse."""
    window, sites = Window(kernel, stride, padding), layer_sites(size, kernel, stride, padding)
    positions, bits, count, back, back_bits, back_count, pairs, counts = (
        part.cpu() for part in site_lists.window_lists(sites.source, sites.active, window)
    )
    source, active = sites.source.cpu(), sites.active.cpu()
    height, width = active.shape[2:]
    joined = set()
    for image, _, y, x in active.nonzero().tolist():
        for tap in range(window.taps):
            v = y * stride[0] - padding[0] + tap // kernel[1]
            u = x * stride[1] - padding[1] + tap % kernel[1]
            if 0 <= v < size[0] and 0 <= u < size[1] and source[image, 0, v, u]:
                joined.add(((image * height + y) * width + x, (image * size[0] + v) * size[1] + u, tap))
    for listed_rows, words, n, which, side in (
        (positions, bits, count, active, 0),
        (back, back_bits, back_count, source, 1),
    ):
        n = int(n)
        assert n == int(which.sum()) and sorted(listed_rows.tolist()) == list(range(which.numel()))
        assert set(listed_rows[:n].tolist()) == set(which.flatten().nonzero()[:, 0].tolist())
        assert words[:n].tolist() == sorted(words[:n].tolist()) and not words[n:].any()
        found = {(int(p), t) for p, b in zip(listed_rows[:n], words[:n]) for t in range(9) if int(b) >> t & 1}
        assert found == {(pair[side], pair[2]) for pair in joined}
    for tap in range(window.taps):
        of_tap = sorted(pair[:2] for pair in joined if pair[2] == tap)
        outputs_and_inputs = pairs[:, tap, : counts[tap]].T.tolist()
        assert [tuple(pair) for pair in outputs_and_inputs] == of_tap


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_everything_hidden_and_everything_visible(share):
    sites = Sites(torch.full((3, 1, 4, 7), bool(share), device=DEVICE), None)
    x, weight, g = normal(3, 16, 4, 7, seed=1), normal(16, 16, 3, 3, seed=2), normal(3, 16, 4, 7, seed=3)
    for a, b in zip(*(conv(x, weight, g, sites, 1, 1, backend) for backend in ("reference", "triton"))):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    options = {"weight": torch.ones(16, device=DEVICE), "bias": torch.zeros(16, device=DEVICE), "sites": sites}
    a, b = (ops.masked_batch_norm(x, **options, backend=backend) for backend in ("reference", "triton"))
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 129])
def test_row_counts_around_a_tile(rows):
    active = torch.zeros(2 * 8 * 12, dtype=torch.bool)
    active[torch.randperm(192, generator=torch.Generator().manual_seed(0))[:rows]] = True
    sites = Sites(active.view(2, 1, 8, 12).to(DEVICE), None)
    x, weight, g = normal(2, 16, 8, 12, seed=1), normal(32, 16, 3, 3, seed=2), normal(2, 32, 8, 12, seed=3)
    for a, b in zip(*(conv(x, weight, g, sites, 1, 1, backend) for backend in ("reference", "triton"))):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_weight_gradient_in_chunks_and_bitwise_repeats(monkeypatch):
    """The same sums from one chunk a tap and from many, and the same bits again."""
    sites = layer_sites((8, 12), (3, 3), (1, 1), (1, 1), share=0.8)
    x, weight, g = normal(4, 16, 8, 12, seed=1), normal(16, 16, 3, 3, seed=2), normal(4, 16, 8, 12, seed=3)
    results = []
    for chunks in (10, 40, 40):
        monkeypatch.setattr(masked_conv, "gradient_chunks", lambda *_, chunks=chunks: chunks)
        results.append(conv(x, weight, g, sites, 1, 1, "triton"))
    torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-5, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2]))


def norm(x, residual, weight, bias, g, sites, backend, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual, weight, bias)]
    x, residual, weight, bias = leaves
    y = ops.masked_batch_norm(x, weight, bias, sites, residual=residual, backend=backend, **options)
    y.backward(g)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@dtypes
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("group_size", [None, 2, 3])
def test_norm_against_float64_with_poison(dtype, relu, group_size):
    """A mean of 50 deviations away from 0; 70 channels and 840 sites cross block borders."""
    (active,) = maps((6, 20), batch=7)
    sites = Sites(active, None)
    x = (normal(7, 70, 6, 20, seed=1) + 50).to(dtype)
    residual, g = (normal(7, 70, 6, 20, seed=s).to(dtype) for s in (2, 5))
    weight, bias = normal(70, seed=3), normal(70, seed=4)
    options = {"relu": relu, "group_size": group_size}
    exact = norm(
        x.double(), residual.double(), weight.double(), bias.double(), g.double(), sites, "reference", **options
    )
    poisoned = [torch.where(active, t, torch.nan) for t in (x, residual, g)]
    ours = norm(poisoned[0], poisoned[1], weight, bias, poisoned[2], sites, "triton", **options)
    eps = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    passes = exact[0].abs() > 10 * eps  # near 0 ReLU may go either way
    for what, a, b in zip(("output", "grad_x", "grad_residual", "grad_weight", "grad_bias"), exact, ours):
        error = (b - a).abs()
        error = torch.where(passes | ~active, error, 0) if error.dim() == 4 and relu else error
        assert float(error.max()) <= eps * float(a.abs().max()), what


def test_norm_writes_active_sites_only_and_repeats_bitwise():
    (active,) = maps((4, 26), batch=5)
    x = normal(5, 16, 4, 26, seed=1).contiguous(memory_format=torch.channels_last)
    weight, bias = normal(16, seed=3), normal(16, seed=4)
    outs = []
    for _ in range(2):
        out = torch.full_like(x, 7.0)
        groups = masked_norm.Groups(active, [2, 3], 16)
        masked_norm.masked_norm_fwd(x, (weight, bias), None, out, groups, 1e-5, False)
        outs.append(out)
    inactive = ~active.expand_as(x)
    assert bool((outs[0][inactive] == 7).all()) and torch.equal(*outs)
    assert float(outs[0][2:].movedim(1, -1)[active[2:, 0]].mean(0).sub(bias).abs().max()) < 1e-4


def test_the_masked_pass_of_the_network(monkeypatch):
    """Every sparse layer on Triton: features and gradients of the dense x mask pass.

    Lists are made once a stage; with the extension all of them in front of the pass, as on a GPU. What the layers leave
    unfilled holds NaN and reaches nothing.
    """
    results, made = [], []
    real, empty, together = site_lists.window_lists, memory.empty, native.has("list_jobs")
    if together:
        monkeypatch.setattr(site_lists, "_compiled", lambda *_: True)
    monkeypatch.setattr(memory, "empty", lambda *a: empty(*a).fill_(torch.nan))
    monkeypatch.setattr(site_lists, "window_lists", lambda *a: made.append(a) or real(*a))
    for order in ("reference", "triton"):
        torch.manual_seed(0)
        model = ResNet29(0.125).to(DEVICE)
        del model.stages[2].layers[1], model.stages[3].layers[2:]  # the interpreter is slow: one layer of each kind
        masks = ops.draw_masks(
            torch.arange(2, device=DEVICE), seed=0, epoch=0, size=(32, 20), unit="stage3", mask_ratio=0.6, num_blocks=0
        )
        images = normal(2, 3, 32, 20, seed=0).masked_fill(masks.pixels, torch.nan).requires_grad_()
        monkeypatch.setenv("RCMSTR_FAST_BACKEND", order)
        features, _ = model.forward_masked(images, masks, "anchored")
        features.square().sum().backward()
        assert bool((images.grad.masked_select(masks.pixels) == 0).all())
        results.append([features, images.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert float((b - a).detach().norm()) <= 2e-3 * float(a.detach().norm()) + 1e-6
    assert len(made) == (0 if together else 9)  # 3x3 in four stages, 1x1 in three of them, the two 2x2


def test_opcheck():
    sites = layer_sites((4, 7), (3, 3), (1, 1), (1, 1), batch=3)
    x = normal(3, 16, 4, 7, seed=1).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = normal(16, 16, 3, 3, seed=2).requires_grad_()
    lists = site_lists.window_lists(sites.source, sites.active, Window((3, 3), (1, 1), (1, 1)))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    values = weight.detach().half()
    alone = (x.half(), values, weight, [], None, sites.active, list(lists), [3, 3, 1, 1, 1, 1], [3], 0.0, False, True)
    torch.library.opcheck(triton._conv_norm, alone, test_utils=tests)
    affine = [normal(16, seed=s).requires_grad_() for s in (3, 4)]
    alone = (x, None, None, affine, x, sites.active, [], [1, 1, 1, 1, 0, 0], [2, 1], 1e-5, True, False)
    torch.library.opcheck(triton._conv_norm, alone, test_utils=tests)


def test_tiles_cover_the_networks_channels():
    for family in FAMILIES:
        for channels in (3, 8, 16, 32, 64, 128, 256, 512):
            shape = masked_tiles.tile(family, channels, channels, 2)
            assert shape.block_k >= 16 and shape.block_n >= min(16, channels)
    assert masked_tiles.gradient_chunks(16, 9, 132, 53248, 64) == 9 + 33
    assert masked_tiles.gradient_chunks(16, 9, 132, 0, 64) == 10


@pytest.mark.skipif(not native.has("list_jobs"), reason="the extension rcmstr_fast._C is not built")
@layers
def test_compiled_lists_are_the_same(channels, outputs, size, kernel, stride, padding):
    """csrc/sites.h against plain PyTorch: counts, and what stands before each count, entry for entry."""
    window, sites = Window(kernel, stride, padding), layer_sites(size, kernel, stride, padding, batch=7)
    words, reached = site_lists.tap_words(sites.source, sites.active, window)
    rows = (
        site_lists.sorted_rows(sites.active, words, window.taps),
        site_lists.sorted_rows(sites.source, reached, window.taps),
    )
    pairs, counts = site_lists.tap_pairs(words, window, sites.source.shape[2:])
    (made,) = site_lists.compiled_lists([(sites.source, sites.active, window)])
    for (positions, bits, count), (mine, mine_bits, mine_count) in zip(rows, (made[:3], made[3:6])):
        assert torch.equal(mine_count, count)
        assert torch.equal(mine[:count], positions[:count]) and torch.equal(mine_bits[:count], bits[:count])
    assert torch.equal(made[7], counts)
    for tap, count in enumerate(counts.tolist()):
        assert torch.equal(made[6][:, tap, :count], pairs[:, tap, :count])


@pytest.mark.skipif(not native.has("list_jobs"), reason="the extension rcmstr_fast._C is not built")
def test_lists_of_a_pass_are_made_together(monkeypatch):
    """More windows than one call takes, on two stages of which the second has another size: each as made alone."""
    fine, coarse = maps((8, 12), (4, 12), batch=3)
    stages = [site_lists.ListSites.make(s) for s in (Sites(fine, None), Sites(coarse, fine))]
    windows = [Window((k, k), (1, 1), (k // 2, k // 2)) for k in (1, 3)], [Window((2, 1), (2, 1), (0, 0))] * 2
    windows[0].append(Window((1, 3), (1, 1), (0, 1)))
    windows[1].extend(Window((k, k), (1, 1), (k // 2, k // 2)) for k in (1, 3))
    site_lists.prepare(stages, windows)
    assert not stages[0]._kept  # made when asked for, without a GPU
    monkeypatch.setattr(site_lists, "_compiled", lambda *_: True)
    site_lists.prepare(stages, windows)
    assert [len(stage._kept) for stage in stages] == [3, 3]
    for stage in stages:
        for (window, shape), kept in stage._kept.items():
            source = stage.active if shape == tuple(stage.active.shape) else stage.source
            (alone,) = site_lists.compiled_lists([(source, stage.active, window)])
            assert kept is stage.of_window(source, window)
            for first, count in ((0, 2), (3, 5)):
                n = int(alone[count])
                assert int(kept[count]) == n and torch.equal(kept[first][:n], alone[first][:n])
            assert torch.equal(kept[7], alone[7])


@dtypes
@pytest.mark.parametrize(("stride", "padding"), [((2, 2), (0, 0)), ((2, 1), (0, 1))])
def test_pool_is_exact_with_poison_and_writes_active_sites_only(stride, padding, dtype):
    size = (8, 12)
    sites = layer_sites(size, (2, 2), stride, padding)
    assert sites.active.shape[2:] != size
    x, g = normal(4, 70, *size, seed=1).to(dtype) - 3, normal(4, 70, *sites.active.shape[2:], seed=2).to(dtype)
    results = []
    for backend, dirty in (("reference", False), ("triton", True)):
        leaf = (torch.where(sites.source, x, torch.nan) if dirty else x.clone()).requires_grad_()
        y = ops.masked_max_pool2d(leaf, sites, kernel_size=2, stride=stride, padding=padding, backend=backend)
        y.backward(torch.where(sites.active, g, torch.nan) if dirty else g)
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[1][0], results[0][0]) and bool((results[0][0] < 0).any())
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-2, atol=1e-5)
    geometry = [2, 2, *stride, *padding]
    out = torch.full_like(results[0][0], 7.0).contiguous(memory_format=torch.channels_last)
    which = torch.full_like(out, 5, dtype=torch.int8)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    masked_pool.masked_pool_fwd(nhwc, sites.source, sites.active, out, which, geometry)
    hidden = ~sites.active.expand_as(out)
    assert bool((out[hidden] == 7).all()) and bool((which[hidden] == 5).all()) and bool((which[~hidden] < 4).all())
    grad_x = torch.full_like(nhwc, 7.0)
    g = g.contiguous(memory_format=torch.channels_last)
    masked_pool.masked_pool_bwd(g, which, sites.source, sites.active, grad_x, geometry)
    assert bool((grad_x[~sites.source.expand_as(grad_x)] == 7).all())


def test_opcheck_pool():
    sites = layer_sites((4, 6), (2, 2), (2, 2), (0, 0), batch=3)
    x = normal(3, 5, 4, 6, seed=1).requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (x, sites.source, sites.active, [2, 2, 2, 2, 0, 0], False)
    torch.library.opcheck(triton_pool.max_pool, arguments, test_utils=tests)
