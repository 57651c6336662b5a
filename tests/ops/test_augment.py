"""augment_views: parameters, each operation against SciPy and Pillow, agreement of backends, repeatability."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats
from scipy.interpolate import RegularGridInterpolator

from rcmstr_fast import random
from rcmstr_fast.ops import augment_views, dispatch, draw_order, each_operation, native, permute_strips
from rcmstr_fast.ops.augment_views import OPERATIONS, PRESETS, AugmentPreset, compiled, cpu, cuda, presets
from rcmstr_fast.ops.augment_views import parameters as par
from rcmstr_fast.ops.augment_views import reference as ref

SHAPES = [(1, (32, 100)), (3, (32, 128)), (17, (8, 12)), (3, (1, 1)), (3, (5, 3))]
BIG = 1 << 33
GREY = 127.5  # normalised units to grey levels
#: Largest difference of two backends, in grey levels; the contract allows one.
AGREE = 0.05


def _backends() -> list:
    return [
        pytest.param(
            name,
            marks=[pytest.mark.gpu] * (name == "cuda")
            + [pytest.mark.skipif(bool(why), reason=f"backend {name}: {', '.join(why)}")],
        )
        for name, why in dispatch.availability()["augment_views"].items()
    ]


BACKENDS = _backends()
COMPILED = [p for p in BACKENDS if p.values[0] != "reference"]


def _device(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def _images(batch: int, size: tuple[int, int], kind: str = "random") -> torch.Tensor:
    rng = np.random.default_rng(batch + size[1])
    images = rng.integers(0, 256, (batch, *size, 3))
    if kind == "smooth":
        images = ndimage.gaussian_filter(images.astype(np.float64), (0, 2, 2, 0))
        images = (images - images.min()) / (np.ptp(images) + 1e-9) * 255
    return torch.from_numpy(images.astype(np.uint8))


def _views(images: torch.Tensor, backend: str, *, first: int = BIG, **changes) -> torch.Tensor:
    index = changes.pop("index", torch.arange(len(images)) + first)
    arguments = {"seed": 11, "epoch": 2, "num_views": 2, "size": tuple(images.shape[1:3]), **changes}
    return augment_views(images.to(_device(backend)), index=index, backend=backend, **arguments).cpu()


def _apply(images: torch.Tensor, rows: torch.Tensor, backend: str) -> np.ndarray:
    """Grey levels [V, B, H, W, 3] of one backend with given parameters."""
    if backend == "reference":
        views = ref.apply_parameters(images, rows)
    else:
        views = compiled.apply(images.to(_device(backend)), rows.to(_device(backend)))
    return (views.permute(0, 1, 3, 4, 2).double().cpu().numpy() + 1.0) * GREY


def _rows(count: int, view: int = 0, preset: str = "pretrain", **changes) -> torch.Tensor:
    keys = {"seed": 11, "epoch": 2, **changes}
    of_view = presets.views_of(preset, 2)[view % 2]
    return par.draw_parameters(torch.arange(count) + BIG, view=view, preset=of_view, **keys)


# Parameters


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("seed", [0, -1, (1 << 64) - 5, 1 << 40])
@pytest.mark.parametrize("backend", COMPILED)
def test_compiled_modules_draw_the_reference_parameters(backend, preset, seed):
    index = torch.tensor([0, 1, 2**31, 2**32 + 7, 2**48 - 1])
    of_views = presets.views_of(preset, 2)
    drawn = compiled.draw(index.to(_device(backend)), seed, 2**32 - 1, of_views).cpu()
    for view, of_view in enumerate(of_views):
        expected = par.draw_parameters(index, seed=seed, epoch=2**32 - 1, view=view, preset=of_view)
        assert torch.equal(drawn[view, :, : par.CONTRAST], expected[:, : par.CONTRAST])
        torch.testing.assert_close(drawn[view], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("preset", "operations", "largest"), [("pretrain", 7, 5), ("light", 4, 4)])
def test_subset_size_and_order_are_uniform(preset, operations, largest):
    rows = _rows(20_000, preset=preset)
    count, order = rows[:, par.COUNT].long(), rows[:, par.ORDER : par.CONTRAST].long()
    sizes = torch.bincount(count, minlength=largest + 1)
    assert sizes[0] == 0 and stats.chisquare(sizes[1:].numpy()).pvalue > 1e-4
    for place in range(largest):  # every operation as often as the others at every place
        used = order[count > place, place]
        assert stats.chisquare(torch.bincount(used, minlength=operations).numpy()).pvalue > 1e-4
        assert (order[count <= place, place] == -1).all()
    pairs = order[count > 1, 0] * operations + order[count > 1, 1]
    seen = torch.bincount(pairs, minlength=operations**2).view(operations, operations)
    assert (seen.diagonal() == 0).all()  # without repetition
    assert stats.chisquare(seen[~torch.eye(operations, dtype=torch.bool)].numpy()).pvalue > 1e-4


def test_uniform_parameters_fill_their_ranges():
    rows = _rows(20_000).double().numpy()
    ranges = [(0.5, 1.0), (0.5, 1.5), (0, 0.4), (0, 0.4), (0, 0.02), (0, 0.02), (0, 0.5), (0, 0.5)]
    for place, (low, high) in enumerate(ranges, par.CONTRAST):
        values = rows[:, place]
        assert low <= values.min() and values.max() <= high
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-4


def _shifts(rows: torch.Tensor, first: int, last: int, word: int, low: float, high: float) -> torch.Tensor:
    """Shifts as standard normals: over the deviation of their view."""
    words = random.words(torch.arange(len(rows)) + BIG, par.WORDS, seed=11, stream=random.AUGMENT, epoch=2)
    deviation = low + (high - low) * random.uniform(words[:, word])
    return (rows[:, first:last] / deviation[:, None]).double()


def test_nodes_shift_normally_and_stay_in_the_picture():
    rows = _rows(20_000)
    standard = _shifts(rows, par.GRID, par.CORNERS, 16, 0.02, 0.03).view(-1, 4, 4, 2)
    inner = standard[:, 1:3, 1:3].flatten(1)
    assert stats.kstest(inner.flatten()[:50_000].numpy(), "norm").pvalue > 1e-4
    assert (torch.corrcoef(inner.T) - torch.eye(8)).abs().max() < 0.05
    node = torch.arange(4) / 3
    places = rows[:, par.GRID : par.CORNERS].view(-1, 4, 4, 2) + torch.stack(
        torch.meshgrid(node, node, indexing="ij"), 2
    )
    assert places.min() >= 0 and places.max() <= 1
    for axis, border in ((1, standard[..., 0]), (2, standard[..., 1])):
        assert (border.select(axis, 0) >= 0).all() and (border.select(axis, 3) <= 0).all()
        for edge in (0, 3):  # what would leave the picture, half of the shifts, is cut to its border
            assert (border.select(axis, edge) == 0).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_corners_move_inwards_by_the_absolute_values_of_normal_shifts():
    rows = _rows(20_000)
    standard = _shifts(rows, par.CORNERS, par.JITTER_ORDER, 17, 0.01, 0.02)
    inwards = torch.tensor([1, 1, 1, -1, -1, -1, -1, 1])
    assert (standard * inwards >= 0).all()
    assert stats.kstest(standard.abs().flatten()[:50_000].numpy(), "halfnorm").pvalue > 1e-4
    assert (torch.corrcoef(standard.T) - torch.eye(8)).abs().max() < 0.05


def test_seed_epoch_index_and_view_all_change_the_parameters():
    base = _rows(64)
    for other in (_rows(64, seed=12), _rows(64, epoch=3), _rows(64, view=1), _rows(65)[1:]):
        drawn = slice(par.CONTRAST, par.THRESHOLD)  # without what a preset fixes and what is cut to 0
        assert (base[:, drawn] != other[:, drawn]).double().mean() > 0.99


# Each operation against an independent implementation


def _pixel_positions(size: tuple[int, int]) -> np.ndarray:
    """[2, H, W]: y and x of the pixel centres as fractions."""
    return np.stack(np.meshgrid(*[(np.arange(n) + 0.5) / n for n in size], indexing="ij"))


def _read(image: np.ndarray, positions: np.ndarray) -> np.ndarray:
    at = [positions[i] * image.shape[i] - 0.5 for i in (0, 1)]
    planes = [ndimage.map_coordinates(image[..., c], at, order=1, mode="nearest") for c in range(3)]
    return np.stack(planes, -1)


def _shifted_by_grid(row: np.ndarray, positions: np.ndarray) -> np.ndarray:
    points = np.linspace(0, 1, 4)
    shifts = row[par.GRID : par.CORNERS].reshape(4, 4, 2)
    inside = np.moveaxis(positions, 0, -1).clip(0, 1)
    return positions + np.moveaxis(RegularGridInterpolator((points, points), shifts)(inside), -1, 0)


def _projected(row: np.ndarray, positions: np.ndarray) -> np.ndarray:
    corners = np.array([(0, 0), (0, 1), (1, 1), (1, 0)], float)  # y, x
    equations, values = [], []
    for (y, x), (to_y, to_x) in zip(corners, corners + row[par.CORNERS : par.JITTER_ORDER].reshape(4, 2)):
        equations += [[x, y, 1, 0, 0, 0, -x * to_x, -y * to_x], [0, 0, 0, x, y, 1, -x * to_y, -y * to_y]]
        values += [to_x, to_y]
    matrix = np.append(np.linalg.solve(equations, values), 1.0).reshape(3, 3)
    x, y, scale = np.einsum("ij,jhw->ihw", matrix, np.stack([positions[1], positions[0], np.ones_like(positions[0])]))
    return np.stack([y, x]) / scale


def _cropped(image: np.ndarray, row: np.ndarray, rows: bool, columns: bool) -> np.ndarray:
    height, width = image.shape[:2]
    top, bottom = row[par.ROWS : par.COLUMNS] * height * rows
    left, right = row[par.COLUMNS : par.SHARPEN] * width * columns
    box = (left, top, width - right, height - bottom)
    planes = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    return np.stack([np.asarray(p.resize((width, height), Image.Resampling.BILINEAR, box=box)) for p in planes], -1)


def _sharpened(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    alpha, lightness = row[par.SHARPEN : par.ANGLE]
    effect = np.full((3, 3), -1.0)
    effect[1, 1] = 8.0 + lightness
    identity = np.zeros((3, 3))
    identity[1, 1] = 1.0
    kernel = (1 - alpha) * identity + alpha * effect
    return ndimage.convolve(image, kernel[..., None], mode="nearest").clip(0, 255)


ORACLES = {
    "contrast": lambda image, row: 127 + row[par.CONTRAST] * (image - 127),
    "blur": lambda image, row: ndimage.gaussian_filter(
        image, row[par.SIGMA], mode="nearest", truncate=3.0, axes=(0, 1)
    ),
    "crop_rows": lambda image, row: _cropped(image, row, True, False),
    "crop_columns": lambda image, row: _cropped(image, row, False, True),
    "sharpen": _sharpened,
    "piecewise_affine": lambda image, row: _read(image, _shifted_by_grid(row, _pixel_positions(image.shape[:2]))),
    "perspective": lambda image, row: _read(image, _projected(row, _pixel_positions(image.shape[:2]))),
}


@pytest.mark.parametrize("size", [(32, 100), (7, 11)])
@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("name", AugmentPreset().names)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_operation_equals_an_independent_implementation(backend, name, kind, size):
    images = _images(6, size, kind)
    rows = par.only(_rows(6), name)
    views = _apply(images, rows[None], backend)[0]
    for image, row, view in zip(images.double().numpy(), rows.double().numpy(), views):
        np.testing.assert_allclose(view, ORACLES[name](image, row), atol=AGREE)


@pytest.mark.parametrize("preset", ["pretrain", "simclr"])
def test_each_operation_alone(preset):
    images, index = _images(3, (8, 12)), torch.arange(3) + BIG
    alone = each_operation(images, seed=11, epoch=2, index=index, view=1, preset=preset)
    assert tuple(alone) == PRESETS[preset].names
    rows = _rows(3, view=1, preset=preset)
    for name, picture in alone.items():
        assert torch.equal(picture, ref.apply_parameters(images, par.only(rows, name)[None])[0])


# Order


def _ordered(rows: torch.Tensor, *names: str) -> torch.Tensor:
    rows = rows.clone()
    rows[:, par.ORDER : par.CONTRAST] = -1
    rows[:, par.COUNT] = len(names)
    rows[:, par.ORDER : par.ORDER + len(names)] = torch.tensor([float(OPERATIONS.index(n)) for n in names])
    return rows


@pytest.mark.parametrize("backend", BACKENDS)
def test_consecutive_geometric_operations_are_one_map_read_once(backend):
    images, rows = _images(4, (32, 100)), _rows(4)
    views = _apply(images, _ordered(rows, "piecewise_affine", "perspective")[None], backend)[0]
    half = np.array([0.5 / 32, 0.5 / 100])[:, None, None]
    for image, row, view in zip(images.double().numpy(), rows.double().numpy(), views):
        last = _projected(row, _pixel_positions((32, 100))).clip(half, 1 - half)
        np.testing.assert_allclose(view, _read(image, _shifted_by_grid(row, last)), atol=AGREE)
        twice = _read(_read(image, _shifted_by_grid(row, _pixel_positions((32, 100)))), last)
        assert np.abs(view - twice).max() > 5  # reading twice blurs


@pytest.mark.parametrize("names", [("blur", "sharpen"), ("crop_rows", "blur", "perspective", "sharpen", "contrast")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_operations_are_applied_one_after_another(backend, names):
    images, rows = _images(4, (32, 100)), _rows(4)
    views = _apply(images, _ordered(rows, *names)[None], backend)[0]
    reversed_views = _apply(images, _ordered(rows, *names[::-1])[None], backend)[0]
    for image, row, view in zip(images.double().numpy(), rows.double().numpy(), views):
        for name in names:
            image = ORACLES[name](image, row)
        np.testing.assert_allclose(view, image, atol=AGREE)
    assert np.abs(views - reversed_views).max() > 1


# Views


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize(("batch", "size"), SHAPES)
@pytest.mark.parametrize("backend", COMPILED)
def test_backends_agree_with_the_float64_reference(backend, batch, size, kind, preset):
    images = _images(batch, size, kind)
    views = _views(images, backend, preset=preset)
    assert views.shape == (2, batch, 3, *size) and views.dtype == torch.float32
    for view in range(2):
        rows = _rows(batch, view, preset)
        for image, row, made in zip(images.double(), rows, views[view]):
            expected = ref.augment_image(image, row).permute(2, 0, 1)
            assert ((made.double() + 1) * GREY - expected).abs().max() < AGREE


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 19), st.integers(1, 19), st.integers(0, 3), st.integers(0, 2**48 - 4), st.integers(-(2**63), 2**64)
)
def test_any_size_index_and_seed(height, width, batch, first, seed):
    images = _images(batch, (height, width))
    compiled, reference = (
        augment_views(
            images, seed=seed, epoch=0, index=torch.arange(batch) + first, num_views=2, size=(height, width), backend=b
        )
        for b in (None, "reference")
    )
    assert compiled.shape == reference.shape == (2, batch, 3, height, width)
    torch.testing.assert_close(compiled, reference, rtol=0, atol=AGREE / GREY)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_format_and_range(backend):
    views = _views(_images(5, (8, 12)), backend, num_views=3)
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in views)
    assert views.min() >= -1 - 1e-6 and views.max() <= 1 + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_none_only_normalises(backend):
    images = _images(3, (8, 12))
    expected = ((images.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).expand(2, -1, -1, -1, -1)
    torch.testing.assert_close(_views(images, backend, preset="none"), expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_border_appears_in_an_even_picture(backend):
    images = torch.full((200, 8, 12, 3), 90, dtype=torch.uint8)
    views = _views(images, backend)
    assert (views.amax((2, 3, 4)) - views.amin((2, 3, 4))).max() * GREY < AGREE


@pytest.mark.parametrize("backend", COMPILED)
def test_a_view_depends_on_nothing_but_its_key(backend, monkeypatch):
    images = _images(17, (8, 12))
    views = _views(images, backend, num_views=3)
    assert torch.equal(views, _views(images, backend, num_views=3))
    assert torch.equal(views[:2], _views(images, backend))
    order = torch.randperm(17)
    assert torch.equal(views[:2, order], _views(images[order], backend, index=order + BIG))
    assert torch.equal(views[:2, 5:6], _views(images[5:6], backend, first=BIG + 5))
    wide = torch.stack([images, images], dim=3)[:, :, :, 0]  # the same pictures, not contiguous
    assert not wide.is_contiguous() and torch.equal(views[:2], _views(wide, backend))
    for threads in ("1", "5", "64"):
        monkeypatch.setenv("RCMSTR_FAST_THREADS", threads)
        assert torch.equal(views, _views(images, backend, num_views=3))


@pytest.mark.skipif(bool(compiled.missing()), reason="the compiled module is missing")
def test_host_views_are_made_without_the_interpreter_lock():
    images, index = _images(2000, (32, 100)), torch.arange(2000)
    rows = compiled.draw(index, 0, 0, (AugmentPreset(),))
    work = threading.Thread(target=compiled.apply, args=(images, rows))
    ticks = 0
    work.start()
    while work.is_alive():
        time.sleep(0.002)
        ticks += 1
    assert ticks >= 5  # with the lock held this thread would not have run


# The permuted picture and the dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "patches", "group"), [(6, 4, 2), (5, 2, 3), (3, 1, 3), (1, 12, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_permuted_view_comes_along(backend, batch, patches, group, dtype):
    images, index = _images(batch, (8, 12)), torch.arange(batch) + BIG
    shape = {"num_patches": patches, "group_size": group}
    order = draw_order(index, seed=3, epoch=1, **shape).to(_device(backend))
    views = _views(images, backend, dtype=dtype)
    both = _views(images, backend, dtype=dtype, order=order)
    assert both.shape == (3, batch, 3, 8, 12) and both.dtype == dtype
    assert both[2].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(both[:2], views)
    assert torch.equal(both[2], permute_strips(views[0], order.cpu(), **shape))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_the_rounded_float32(backend):
    images = _images(4, (32, 100))
    assert torch.equal(_views(images, backend, dtype=torch.bfloat16), _views(images, backend).bfloat16())


# Errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images_uint8": torch.zeros(2, 8, 12, 3)}, TypeError, "images_uint8 must be .*uint8, got .*float32"),
        ({"images_uint8": None}, TypeError, "images_uint8 must be .*uint8, got NoneType"),
        ({"images_uint8": torch.zeros(2, 3, 8, 12, dtype=torch.uint8)}, ValueError, r"\[B, 8, 12, 3\], got \[2, 3, 8"),
        ({"size": (8, 13)}, ValueError, r"must be \[B, 8, 13, 3\], got \[2, 8, 12, 3\]"),
        ({"size": 8}, TypeError, r"size must be \(height, width\), got 8"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"index must be \[2\] like the images, got \[3\]"),
        ({"index": torch.zeros(2)}, TypeError, "index must be .*int64"),
        ({"index": torch.tensor([0, -1])}, ValueError, r"index must be in \[0, 2\^48\), got -1 to 0"),
        ({"index": torch.tensor([0, 1 << 48])}, ValueError, "index must be in"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"epoch": -1}, ValueError, r"epoch must be in \[0, 2\^32\), got -1"),
        ({"num_views": 0}, ValueError, "num_views must be in .* got 0"),
        (
            {"preset": "strong"},
            ValueError,
            "augment_views: preset must be one of pretrain, light, .*, none, got 'strong'",
        ),
        ({"preset": 3}, TypeError, "preset must be a name, an AugmentPreset or one of them a view, got int"),
        ({"preset": ["none"]}, ValueError, "preset must have one entry a view, 2, got 1"),
        ({"preset": "ibot", "num_views": 3}, ValueError, "preset must have one entry a view, 3, got 2 .'ibot'"),
        ({"dtype": torch.float16}, TypeError, "dtype must be torch.float32 or torch.bfloat16, got torch.float16"),
        ({"order": torch.zeros(2, 4)}, TypeError, "order must be .*int64"),
        ({"order": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, r"order must be \[2, N\] like images_uint8"),
        ({"order": torch.arange(10).view(2, 5)}, ValueError, r"order.shape\[1\] must divide the width"),
        ({"order": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "order must permute the strips"),
        ({"order": torch.arange(8).view(2, 4) + 1}, ValueError, "order must permute the strips"),
        ({"backend": "triton"}, dispatch.BackendError, "'triton' does not exist"),
    ],
)
def test_mistakes_are_named(changes, error, message):
    arguments = {
        "images_uint8": torch.zeros(2, 8, 12, 3, dtype=torch.uint8),
        "seed": 0,
        "epoch": 0,
        "index": torch.arange(2),
        "num_views": 2,
        "size": (8, 12),
    }
    arguments.update(changes)
    with pytest.raises(error, match=message):
        augment_views(arguments.pop("images_uint8"), **arguments)


def test_backends_say_why_they_cannot(monkeypatch):
    images = torch.zeros(1, 8, 12, 3, dtype=torch.uint8)
    assert cuda.unsupported_reasons(images) == ["images_uint8 must be on a CUDA device, got cpu"]
    assert cpu.unsupported_reasons(images) == []
    assert cpu.unsupported_reasons(images.to("meta")) == ["images_uint8 must be on the CPU, got meta"]
    with pytest.raises(dispatch.BackendError, match="backend cuda cannot"):
        augment_views(images, seed=0, epoch=0, index=torch.arange(1), num_views=1, size=(8, 12), backend="cuda")
    for module, reason in ((None, "is missing"), (object(), "is older")):
        monkeypatch.setattr(native, "extension", module)
        assert reason in compiled.missing()[0] and cuda.missing() == compiled.missing()
