"""Presets of augment_views: their tables, files and mistakes, and the operations beside those of `pretrain`."""

import colorsys
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy import ndimage, stats

from rcmstr_fast.fields import ConfigError
from rcmstr_fast.ops import augment_views
from rcmstr_fast.ops.augment_views import OPERATIONS, PRESETS, AugmentPreset, load_preset
from rcmstr_fast.ops.augment_views import parameters as par
from tests.ops.test_augment import AGREE, BACKENDS, GREY, _apply, _images, _read, _rows

MANY = 20_000
SIMCLR = PRESETS["simclr"]


def _drawn(preset: AugmentPreset, count: int = MANY) -> torch.Tensor:
    return par.draw_parameters(torch.arange(count), seed=3, epoch=1, view=0, preset=preset)


def _applied(rows: torch.Tensor) -> list[list[str]]:
    """Names of the operations of each row in order of application."""
    codes = rows[:, par.ORDER : par.CONTRAST].long().tolist()
    return [[OPERATIONS[code] for code in line if code >= 0] for line in codes]


# Operations against independent implementations


def _brightness(image: np.ndarray) -> np.ndarray:
    return np.repeat((image * [0.299, 0.587, 0.114]).sum(2, keepdims=True), 3, axis=2)


def _hue_shifted(image: np.ndarray, shift: float) -> np.ndarray:
    def pixel(rgb):
        hue, saturation, value = colorsys.rgb_to_hsv(*(rgb / 255))
        return np.array(colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value)) * 255

    return np.apply_along_axis(pixel, 2, image)


def _jittered(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    brightness, contrast, saturation, hue = row[par.JITTER : par.GRID]
    for step in row[par.JITTER_ORDER : par.BOX]:
        if step == 0:
            image = image * brightness
        if step == 1:
            image = contrast * image + (1 - contrast) * _brightness(image).mean()
        if step == 2:
            image = saturation * image + (1 - saturation) * _brightness(image)
        image = _hue_shifted(image, hue) if step == 3 else image.clip(0, 255)
    return image


def _rotated(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    angle = np.deg2rad(row[par.ANGLE])
    y, x = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij")
    from_y, from_x = np.cos(angle) * y - np.sin(angle) * x, np.cos(angle) * x + np.sin(angle) * y
    return _read(image, np.stack([from_y / height + 0.5, from_x / width + 0.5]))


def _resized(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    top, left, tall, wide = row[par.BOX : par.RADIUS]
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    return _read(image, np.stack(np.meshgrid(top + tall * y, left + wide * x, indexing="ij")))


ORACLES = {
    "flip": lambda image, row: image[:, ::-1],
    "rotate": _rotated,
    "colour_jitter": _jittered,
    "grey": lambda image, row: _brightness(image),
    "solarise": lambda image, row: np.asarray(ImageOps.solarize(Image.fromarray(image.astype(np.uint8)), 128)) * 1.0,
    "resized_crop": _resized,
}


@pytest.mark.parametrize("size", [(32, 100), (7, 11)])
@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_operation_equals_an_independent_implementation(backend, name, size):
    images = _images(6, size, "smooth" if name in ("rotate", "resized_crop") else "random")
    rows = par.only(_rows(6, preset="simclr"), name)
    views = _apply(images, rows[None], backend)[0]
    for image, row, view in zip(images.double().numpy(), rows.double().numpy(), views):
        np.testing.assert_allclose(view, ORACLES[name](image, row), atol=AGREE)
    assert name == "flip" or len({view.tobytes() for view in views}) == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_colours_work_on_grey_levels_after_a_contrast(backend):
    images, rows = _images(4, (8, 12)), _rows(4, preset="simclr")
    for name in ("solarise", "grey", "colour_jitter"):
        rows = par.only(rows, "contrast")
        rows[:, par.COUNT], rows[:, par.ORDER + 1] = 2, OPERATIONS.index(name)
        for image, row, view in zip(
            images.double().numpy(), rows.double().numpy(), _apply(images, rows[None], backend)[0]
        ):
            lower = 127 + row[par.CONTRAST] * (image - 127)
            if name == "solarise":
                np.testing.assert_allclose(view, np.where(lower >= 127.5, 255 - lower, lower), atol=AGREE)
            else:
                np.testing.assert_allclose(view, ORACLES[name](lower, row), atol=AGREE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_half_turn_is_a_half_turn_and_a_cut_kernel_is_cut(backend):
    images = _images(2, (6, 10))
    rows = par.only(_rows(2), "rotate")
    rows[:, par.ANGLE] = 180
    np.testing.assert_allclose(_apply(images, rows[None], backend)[0], images.flip(1, 2).double(), atol=AGREE)
    rows = par.only(_drawn(SIMCLR, 2), "blur")
    for image, row, view in zip(images.double().numpy(), rows.numpy(), _apply(images, rows[None], backend)[0]):
        expected = ndimage.gaussian_filter(image, float(row[par.SIGMA]), mode="nearest", radius=1, axes=(0, 1))
        np.testing.assert_allclose(view, expected, atol=AGREE if int(3 * row[par.SIGMA] + 0.5) else 1)


# What is drawn


def test_new_parameters_fill_their_ranges():
    rows = _drawn(SIMCLR).double().numpy()
    places = [(par.ANGLE, -10, 10), *((par.JITTER + i, 0.2, 1.8) for i in range(3)), (par.JITTER + 3, -0.2, 0.2)]
    for place, low, high in places:
        assert low <= rows[:, place].min() and rows[:, place].max() <= high
        assert stats.kstest(rows[:, place], stats.uniform(low, high - low).cdf).pvalue > 1e-4
    orders = rows[:, par.JITTER_ORDER : par.BOX] @ [64, 16, 4, 1]
    _, counts = np.unique(orders, return_counts=True)
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("name", ["simclr", "ibot"])
def test_resized_crops_lie_in_the_picture_with_area_and_aspect_in_range(name):
    preset = PRESETS[name] if name == "simclr" else PRESETS[name][0]
    top, left, height, width = _drawn(preset)[:, par.BOX : par.RADIUS].double().unbind(1)
    assert min(top.min(), left.min()) >= 0 and max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    area, aspect = (height * width).numpy(), (width / height).numpy()
    assert preset.resized_area[0] - 1e-6 <= area.min() and area.max() <= 1
    assert aspect.min() >= 0.75 - 1e-5 and aspect.max() <= 4 / 3 + 1e-5
    fitting = area < 0.7  # no aspect in range makes such a crop too large: nothing is drawn again
    low = preset.resized_area[0]
    assert stats.kstest(area[fitting], stats.uniform(low, 0.7 - low).cdf).pvalue > 1e-4
    limit = np.log(4 / 3)
    assert stats.kstest(np.log(aspect[fitting]), stats.uniform(-limit, 2 * limit).cdf).pvalue > 1e-4
    assert stats.kstest((top / (1 - height)).numpy()[fitting], "uniform").pvalue > 1e-4


def test_a_crop_that_never_fits_is_cut():
    preset = AugmentPreset(resized_area=(1, 1), resized_aspect=(2, 2))
    assert _drawn(preset, 4)[:, par.BOX : par.RADIUS].sub(torch.tensor([0, 0, 0.5**0.5, 1]))[:, 1:].abs().max() < 1e-6


def test_probabilities_and_fixed_order():
    lists = _applied(_drawn(SIMCLR))
    listed = [name for name, _ in SIMCLR.operations]
    assert all(names == [name for name in listed if name in names] for names in lists)
    for name, chance in SIMCLR.operations:
        assert sum(name in names for names in lists) / MANY == pytest.approx(chance, abs=0.015), name


def test_dig_is_a_subset_and_then_two_operations():
    lists = _applied(_drawn(PRESETS["dig"]))
    jittered = [names for names in lists if "colour_jitter" in names]
    assert len(jittered) / MANY == pytest.approx(0.8, abs=0.015)
    counts = [names.index("colour_jitter") for names in jittered]
    assert stats.chisquare(np.bincount(counts, minlength=6)[2:]).pvalue > 1e-4 and set(counts) == {2, 3, 4, 5}
    last = [names[names.index("colour_jitter") + 1 :] for names in jittered]
    assert {tuple(names) for names in last} == {(), ("grey",)}
    assert sum(map(len, last)) / len(last) == pytest.approx(0.2, abs=0.015)
    firsts = np.bincount([OPERATIONS.index(names[0]) for names in jittered], minlength=len(OPERATIONS))
    assert stats.chisquare(firsts[firsts > 0]).pvalue > 1e-4 and (firsts > 0).sum() == 10


def test_a_fixed_order_with_a_subset_keeps_the_list_s_order():
    preset = AugmentPreset(operations=OPERATIONS[::-1], subset=(3, 13), order="fixed", then={"grey": 1})
    for names in _applied(_drawn(preset, 200)):
        codes = [OPERATIONS.index(name) for name in names]
        assert codes[:-1] == sorted(codes[:-1], reverse=True) and 4 <= len(codes) <= 14 and names[-1] == "grey"


def test_a_range_changes_nothing_but_its_own_parameter():
    changed = (_drawn(AugmentPreset(), 50) != _drawn(AugmentPreset(crop_rows=(0.1, 0.45)), 50)).any(0)
    assert changed.nonzero().flatten().tolist() == [par.ROWS, par.ROWS + 1]
    chances = _drawn(AugmentPreset(operations={n: 0.5 for n in OPERATIONS[:7]}), 50) != _drawn(AugmentPreset(), 50)
    assert not chances[:, par.CONTRAST :].any() and chances[:, par.COUNT].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_has_one_preset_a_view(backend):
    images, keys = _images(5, (8, 12)), {"seed": 1, "epoch": 0, "index": torch.arange(5), "size": (8, 12)}
    device = "cuda" if backend == "cuda" else "cpu"

    def views(preset, count):
        return augment_views(images.to(device), num_views=count, preset=preset, backend=backend, **keys).cpu()

    mixed = views(["none", "dig", PRESETS["light"]], 3)
    for view, preset in enumerate(["none", "dig", "light"]):
        assert torch.equal(mixed[view], views(preset, 3)[view])
    assert torch.equal(views("ibot", 2), views(PRESETS["ibot"], 2))
    assert (mixed[0] * GREY + GREY - images.permute(0, 3, 1, 2)).abs().max() < AGREE


# Files and mistakes


def test_presets_come_from_names_mappings_and_files(tmp_path):
    assert load_preset("dig") is PRESETS["dig"] and load_preset(SIMCLR) is SIMCLR
    given = {"base": "simclr", "operations": ["grey", "blur"], "blur_sigma": [1, 1.5], "subset": [1, 2]}
    expected = dataclasses.replace(
        SIMCLR, operations=(("grey", 1.0), ("blur", 1.0)), blur_sigma=(1, 1.5), subset=(1, 2)
    )
    assert load_preset(given) == expected
    path = tmp_path / "mine.yaml"
    path.write_text(
        "- none\n- base: simclr\n  operations: {grey: 1, blur: 1.0}\n  blur_sigma: [1, 1.5]\n  subset: [1, 2]\n"
    )
    assert load_preset(str(path)) == load_preset(path) == (PRESETS["none"], expected)
    assert hash(expected) == hash(load_preset(given))  # tables are kept by preset


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("strong", "must be one of pretrain, .* got 'strong'"),
        ("missing.yaml", "missing.yaml cannot be read"),
        ({"contrst": [0, 1]}, "fields are base, operations, .* got 'contrst'"),
        ({"base": "strong"}, "base must be one of .* got 'strong'"),
        ({"base": "ibot"}, "'ibot' has an entry a view"),
        ({"contrast": [0.5, 1.5]}, "augmentation preset: contrast must be at least 0 and at most 1, got 1.5"),
        ({"contrast": [0.9, 0.5]}, r"contrast must be low before high, got \[0.9, 0.5\]"),
        ({"contrast": 0.5}, "contrast must be two numbers, low and high, got 0.5"),
        ({"contrast": [0.5, "1"]}, "contrast must be two numbers"),
        ({"crop_rows": [0, 0.5]}, "crop_rows must be at least 0 and at most 0.49, got 0.5"),
        ({"blur_sigma": [0.5, float("nan")]}, "blur_sigma must be low before high, got"),
        ({"blur_sigma": [0, 1]}, "blur_sigma must be at least 0.1 and at most 2, got 0"),
        ({"blur_radius": 2.5}, "blur_radius must be a whole number, got 2.5"),
        ({"blur_radius": 7}, "blur_radius must be at least 1 and at most 6, got 7"),
        ({"operations": {"blurr": 1}}, "operations must name contrast, .* got 'blurr'"),
        ({"operations": {"blur": 1.5}}, "operations.blur must be at least 0 and at most 1, got 1.5"),
        ({"operations": ["blur", "blur"]}, "must name each operation once"),
        ({"operations": [3]}, "operations must map operations to probabilities, got 3"),
        ({"operations": "blur"}, "operations must map operations to probabilities, got 'blur'"),
        ({"subset": [2, 8]}, r"subset must be two numbers of 0 to 7 operations, got \[2, 8\]"),
        ({"subset": [2, 2.5]}, "subset must be a whole number, got 2.5"),
        ({"subset": 3}, "subset must be two numbers, low and high, got 3"),
        ({"order": "any"}, "order must be random or fixed, got 'any'"),
    ],
)
def test_mistakes_are_one_line(source, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_preset(source)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_yaml_is_named(tmp_path):
    path = tmp_path / "broken.yml"
    path.write_text("contrast: [0.5,\n- 1")
    with pytest.raises(ConfigError, match=r"broken.yml is not YAML: .*") as caught:
        load_preset(path)
    assert "\n" not in str(caught.value)
