"""The DALI chain beside the reference: each operation, the fixed order, the permuted view."""

import pytest
import torch

from rcmstr_fast.fields import ConfigError
from rcmstr_fast.ops import draw_order, permute_strips
from rcmstr_fast.ops.augment_views import OPERATIONS, parameters, reference

made = pytest.importorskip("rcmstr_fast.ops.augment_views.dali", reason="DALI is not installed", exc_type=ImportError)

SIZE, BATCH = (32, 100), 6


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (BATCH, *SIZE, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def views():
    return made.DaliViews(batch=2 * BATCH, threads=1, device=torch.device("cpu"))


def drawn() -> torch.Tensor:
    index = torch.arange(BATCH) + 5
    return torch.stack([parameters.draw_parameters(index, seed=4, epoch=1, view=view) for view in range(2)])


def grey(views: torch.Tensor) -> torch.Tensor:
    return (views + 1) * 127.5


@pytest.mark.parametrize("name", made.FIXED_ORDER)
def test_one_operation_is_the_reference_operation(views, images, name):
    rows = parameters.only(drawn(), name)
    difference = (grey(views.apply(images, rows)) - grey(reference.apply_parameters(images, rows))).abs()
    if name == "blur":  # the border is mirrored
        difference = difference[..., 5:-5, 5:-5]
    if name == "perspective":  # positions that are rounded the other way beside a pixel edge
        assert difference.mean() < 0.05
    else:
        assert difference.max() < 0.1


def test_operations_come_in_the_fixed_order(views, images):
    rows = drawn()
    rows[..., parameters.COUNT], rows[..., parameters.ORDER : parameters.CONTRAST] = 3, -1
    names = ("contrast", "crop_columns", "sharpen")
    codes = [float(OPERATIONS.index(name)) for name in names]
    rows[..., parameters.ORDER : parameters.ORDER + 3] = torch.tensor(codes)
    expected = reference.apply_parameters(images, rows)
    rows[..., parameters.ORDER : parameters.ORDER + 3] = torch.tensor(codes[::-1])
    assert (grey(views.apply(images, rows)) - grey(expected)).abs().max() < 0.1


def test_a_call_is_a_function_of_its_keys(views, images):
    index = torch.arange(BATCH)
    order = draw_order(index, seed=0, epoch=3, num_patches=2, group_size=2)
    keys = {"seed": 0, "epoch": 3, "num_views": 2, "size": SIZE, "index": index}
    first, again = views(images, order=order, **keys), views(images, order=order, **keys)
    assert first.shape == (3, BATCH, 3, *SIZE) and first.dtype == torch.float32
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in first)
    assert torch.equal(first, again) and torch.equal(first[:2], views(images, **keys))
    assert torch.equal(first[2], permute_strips(first[0], order, num_patches=2, group_size=2))
    assert not torch.equal(first[0], first[1]) and first.abs().max() <= 1.001
    part = views(images[:2], **(keys | {"index": index[:2]}))
    assert torch.equal(part, first[:2, :2])
    none = views(images, preset="none", **keys)
    assert (grey(none) - images.permute(0, 3, 1, 2)).abs().max() < 1e-3


def test_presets_with_other_operations_are_refused(views, images):
    index = torch.arange(BATCH)
    with pytest.raises(ConfigError, match=r"DALI's views must have operations of contrast, .*, got "):
        views(images, seed=0, epoch=0, index=index, num_views=2, size=SIZE, preset="ibot")
