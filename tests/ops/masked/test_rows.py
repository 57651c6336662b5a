"""Packed rows: the lists against NumPy, the stored pass against the dense one, repeatability, refusals."""

import numpy as np
import pytest
import torch

from rcmstr_fast import ops
from rcmstr_fast.models.resnet import ResNet29
from rcmstr_fast.ops import Sites, dispatch, native
from rcmstr_fast.ops.masked import storage
from rcmstr_fast.ops.masked.cpu import RowList, WindowTable
from rcmstr_fast.ops.masked.layers import StoredSites, Window
from rcmstr_fast.ops.rows import norm_rows
from tests.ops.cases import assert_near, normal

pytestmark = pytest.mark.skipif(bool(native.reasons()), reason=f"{native.reasons()}")

#: (input size, window) of the ResNet's layers.
WINDOWS = [
    ((4, 7), Window((3, 3), (1, 1), (1, 1))),
    ((4, 7), Window((1, 1), (1, 1), (0, 0))),
    ((4, 7), Window((2, 2), (2, 1), (0, 1))),
    ((2, 8), Window((2, 2), (1, 1), (0, 0))),
    ((8, 6), Window((2, 2), (2, 2), (0, 0))),
]
windows = pytest.mark.parametrize(("size", "window"), WINDOWS)


def maps(batch, *sizes, share=0.4, seed=0):
    """Random maps [batch, 1, h, w]; image 0 is all hidden, image 1 (where there is one) has one visible site."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.rand(batch, 1, *size, generator=generator) < share for size in sizes]
    for active in made:
        active[:2] = False
        if batch > 1:
            active[1, 0, 0, 0] = True
    return made


def pair(size, window, batch=5):
    source, active = maps(batch, size, window.output_size(size))
    inputs = RowList(source)
    same = window.output_size(size) == size
    outputs = inputs if same else RowList(active)
    return inputs, outputs


def test_row_list_is_the_order_of_the_map():
    (active,) = maps(4, (3, 5))
    rows = RowList(active)
    assert torch.equal(rows.positions.long(), active.flatten().nonzero()[:, 0])
    assert rows.starts == [0, 0, 1, *(int(active[: i + 1].sum()) for i in (2, 3))]
    assert torch.equal((rows.index >= 0).view_as(active), active)
    assert torch.equal(rows.index[rows.positions.long()], torch.arange(rows.count, dtype=torch.int32))


def test_pack_and_unpack_are_inverse_and_drop_poison():
    (active,) = maps(4, (3, 5))
    rows = RowList(active)
    x = torch.where(active, normal(4, 6, 3, 5, seed=1), torch.nan).requires_grad_()
    packed_rows = rows.pack(x)
    back = rows.unpack(packed_rows)
    assert torch.equal(back, x.detach().nan_to_num(0.0)) and back.is_contiguous(memory_format=torch.channels_last)
    packed_rows.sum().backward()
    assert torch.equal(x.grad, active.double().expand_as(x))


@windows
def test_tables_and_pairs(size, window):
    """Each entry says which site lies under a tap; the pairs are exactly the entries, by tap and then by row."""
    inputs, outputs = pair(size, window)
    lists = WindowTable(window, inputs, outputs)
    height, width = outputs.size
    expected = np.full((outputs.count, window.taps), -1)
    for row, position in enumerate(outputs.positions.tolist()):
        image, y, x = np.unravel_index(position, (5, height, width))
        for tap in range(window.taps):
            v = y * window.stride[0] - window.padding[0] + tap // window.kernel[1]
            u = x * window.stride[1] - window.padding[1] + tap % window.kernel[1]
            if 0 <= v < size[0] and 0 <= u < size[1]:
                expected[row, tap] = inputs.index.view(5, *size)[image, v, u]
    assert (lists.table.numpy() == expected).all()
    in_row, out_row, starts, of_output, of_input = (np.asarray(part) for part in lists.pairs)
    taps, rows = np.nonzero(expected.T >= 0)
    assert (out_row == rows).all() and (in_row == expected[rows, taps]).all()
    assert (np.diff(starts) == (expected >= 0).sum(axis=0)).all()
    assert (of_output[rows, taps] == np.arange(len(rows))).all() and (of_output >= 0).sum() == len(rows)
    assert (of_input[in_row, taps] == np.arange(len(rows))).all() and (of_input >= 0).sum() == len(rows)
    assert (lists.inverse.numpy()[in_row, taps] == out_row).all()


@pytest.mark.parametrize("channels", [3, 40], ids=["columns", "pairs"])
@windows
def test_convolution_and_gradients_match_the_reference(size, window, channels):
    source, active = maps(5, size, window.output_size(size))
    sites = Sites(source if window.output_size(size) == size else active, source)
    results = []
    for backend in ("reference", "cpp"):
        x = normal(5, channels, *size, seed=1).requires_grad_()
        weight = normal(6, channels, *window.kernel, seed=2).requires_grad_()
        y = ops.masked_conv2d(x, weight, sites, stride=window.stride, padding=window.padding, backend=backend)
        y.backward(normal(*y.shape, seed=3))
        results.append((y, x.grad, weight.grad))
    for name, expected, got in zip(("output", "grad_x", "grad_weight"), *results):
        assert_near(got, expected, torch.float64, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [16, 64])
def test_error_is_at_most_twice_that_of_the_dense_layer(channels, dtype):
    """Worst element against float64, of the output and both gradients, on operands rounded alike."""
    (active,) = maps(8, (4, 26))
    sites = Sites(active, None)
    x, weight, g = (
        normal(8, channels, 4, 26, seed=1),
        normal(channels, channels, 3, 3, seed=2),
        normal(8, channels, 4, 26, seed=3),
    )
    operands = [t.to(dtype) for t in (x, weight / channels**0.5, g)]
    results = {}
    for name, precision, backend in (
        ("exact", torch.float64, "reference"),
        ("dense", dtype, "reference"),
        ("ours", dtype, "cpp"),
    ):
        x, weight, g = (t.to(precision, copy=True) for t in operands)
        y = ops.masked_conv2d(x.requires_grad_(), weight.requires_grad_(), sites, padding=1, backend=backend)
        y.backward(g)
        results[name] = [t.detach().double() for t in (y, x.grad, weight.grad)]
    for what, exact, dense, ours in zip(("output", "grad_x", "grad_weight"), *results.values()):
        worst, allowed = (ours - exact).abs().max(), 2 * (dense - exact).abs().max()
        assert worst <= allowed + 1e-6 * exact.abs().max(), f"{what}: worst {worst:.3g}, dense {allowed / 2:.3g}"


def stored_pass(order, dtype=torch.float64, threads=1, autocast=False, ratio=0.7, group_size=2):
    """Features and parameter gradients of a small ResNet's masked pass in one storage."""
    torch.manual_seed(0)
    model = ResNet29(0.125).to(dtype)
    for module in model.modules():
        if hasattr(module, "group_size"):
            module.group_size = group_size
    images = normal(5, 3, 32, 36, seed=0).to(dtype)
    masks = ops.draw_masks(
        torch.arange(5), seed=0, epoch=0, size=(32, 36), unit="stage3", mask_ratio=ratio, num_blocks=0
    )
    images = images.masked_fill(masks.pixels, torch.nan)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            patch.setattr(storage, "LARGEST_PACKED_SHARE", {"cpu": order} if isinstance(order, dict) else {})
            if isinstance(order, str):
                patch.setenv("RCMSTR_FAST_BACKEND", order)
            features, _ = model.forward_masked(images, masks, "any")
        features.double().square().sum().backward()
    finally:
        torch.set_num_threads(before)
    return [features, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("order", ["cpp", {1: 0.0, 100: 1.0}, {1: 1.0, 100: 0.0}, {1: 0.0, 60: 1.0, 400: 0.0}], ids=str)
def test_the_pass_is_the_same_in_every_storage(order):
    """All packed, and packed at the fine, the coarse or the middle stages only; hidden pixels are NaN."""
    for expected, got in zip(stored_pass("reference"), stored_pass(order), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_everything_visible_and_everything_hidden(ratio):
    for expected, got in zip(stored_pass("reference", ratio=ratio), stored_pass("cpp", ratio=ratio), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_repeats_are_bitwise(autocast):
    first, again = (stored_pass("cpp", torch.float32, 2, autocast) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_norm_and_pool_do_not_depend_on_the_number_of_threads(monkeypatch):
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        (active,) = maps(40, (16, 50), share=0.5)
        rows = RowList(active)
        x = normal(rows.count, 24, seed=1).float().requires_grad_()
        y = norm_rows(x, torch.ones(24), torch.zeros(24), rows.group_starts(7), 1e-5, None, True)[0]
        y.square().sum().backward()
        results.append((y, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_bfloat16_pass_is_as_exact_as_the_dense_one():
    """Norm of the error of the features and of all gradients against float64: at most 1.5 times."""
    exact = stored_pass("reference")
    errors = {}
    for order in ("reference", "cpp"):
        found = stored_pass(order, torch.float32, autocast=True)
        pairs = [(a.detach().double() - b.detach(), b.detach()) for a, b in zip(found, exact)]
        gradients = sum(d.square().sum() for d, _ in pairs[1:]) / sum(b.square().sum() for _, b in pairs[1:])
        errors[order] = float(pairs[0][0].norm() / pairs[0][1].norm()), float(gradients.sqrt())
    for ours, dense in zip(errors["cpp"], errors["reference"]):
        assert 0 < ours < 1.5 * dense, errors


def test_the_table_chooses_a_stage_at_a_time(monkeypatch):
    monkeypatch.delenv("RCMSTR_FAST_BACKEND", raising=False)
    monkeypatch.setattr(storage, "LARGEST_PACKED_SHARE", {"cpu": {20: 0.6, 100: 0.3}, "cuda": {}})
    masks = torch.rand(8, 4, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    sites = ops.active_sites(masks, [(8, 16), (4, 8), (2, 8)], "any")
    assert [stage.kept for stage in ops.masked_storage(sites)] == [False, True, False]
    assert all(stage.kept for stage in ops.masked_storage(sites, backend="cpp"))
    assert not any(isinstance(s, StoredSites) for s in ops.masked_storage(sites, backend="reference"))
    assert "60% from 20 sites" in storage.describe()[0] and "cuda: dense x mask (before" in storage.describe()[1]


def test_the_committed_table_packs_the_default_masks_and_nothing_visible(monkeypatch):
    monkeypatch.delenv("RCMSTR_FAST_BACKEND", raising=False)
    sizes = ResNet29(0.125).stage_sizes(32, 100)
    for ratio, wanted in ((0.7, True), (0.0, False)):
        masks = ops.draw_masks(
            torch.arange(4), seed=0, epoch=0, size=(32, 100), unit="stage3", mask_ratio=ratio, num_blocks=0
        )
        stored = ops.masked_storage(ops.active_sites(masks.grid, sizes))
        assert [stage.kept for stage in stored] == [wanted] * 6


def test_half_precision_falls_back_to_maps():
    (active,) = maps(3, (4, 7))
    (sites,) = ops.masked_storage([Sites(active, None)], backend="cpp")
    y = ops.masked_conv2d(normal(3, 4, 4, 7, seed=0).half(), normal(8, 4, 3, 3, seed=1).half(), sites, padding=1)
    assert y.shape == (3, 8, 4, 7)
    assert ops.masked_batch_norm(y, torch.ones(8), torch.zeros(8), sites).dtype == torch.float16


def test_refusals(monkeypatch):
    (active,) = maps(3, (4, 7))
    sites = Sites(active, None)
    (stored,) = ops.masked_storage([sites], backend="cpp")
    count = stored.rows.count
    for call in (
        lambda x: ops.masked_conv2d(x, torch.zeros(5, 4, 3, 3), stored, padding=1),
        lambda x: ops.masked_batch_norm(x, torch.ones(4), torch.ones(4), stored),
    ):
        with pytest.raises(
            ValueError, match=rf"x must be \[{count}, C\] like the active sites, got \[{count + 1}, 4\]"
        ):
            call(torch.zeros(count + 1, 4))
    with pytest.raises(ValueError, match=r"residual must be"):
        ops.masked_batch_norm(
            torch.zeros(count, 4), torch.ones(4), torch.ones(4), stored, residual=torch.zeros(count, 3)
        )
    with pytest.raises(ValueError, match=r"unpack_sites: x must be \[3, C, 4, 7\] like sites"):
        ops.unpack_sites(torch.zeros(2, 3, 4, 7), sites)
    monkeypatch.setattr(native, "extension", None)
    with pytest.raises(dispatch.BackendError, match=r"backend cpp cannot: the extension rcmstr_fast\._C is not built"):
        ops.masked_storage([sites], backend="cpp")
    assert ops.masked_storage([sites]) == [sites]
