"""draw_masks: exact counts, blocks, units, purity."""

import importlib

import pytest
import torch
from scipy.stats import chi2

from rcmstr_fast import ops
from tests.ops.cases import Case, cases

all_cases = cases("draw_masks")
#: Statistics over thousands of images: other backends give the same bits (`test_every_backend_gives_the_same_bits`).
one_case = pytest.mark.parametrize("case", [Case("reference", "cpu")], ids=repr)
VIT = {"size": (32, 128), "unit": "token", "mask_ratio": 0.7, "num_blocks": 1}


def draw(case, count, epoch=0, seed=1, **changes):
    index = torch.arange(count, device=case.device)
    return case(ops.draw_masks, index, seed=seed, epoch=epoch, **(VIT | changes))


@one_case
def test_179_of_256_exactly_and_188_6_with_the_block(case):
    assert (draw(case, 500, num_blocks=0).grid.sum(dim=(1, 2)) == 179).all()
    hidden = draw(case, 4000).grid.sum(dim=(1, 2)).double()
    expected = 179 + 32 * (256 - 179) / 256
    assert expected == pytest.approx(188.6, abs=0.05)
    assert abs(hidden.mean().item() - expected) < 4 * hidden.std().item() / 4000**0.5


@all_cases
@pytest.mark.parametrize(
    ("unit", "size", "grid"),
    [
        ("token", (32, 128), (8, 32)),
        ("lattice", (32, 100), (8, 25)),
        ("stage3", (32, 100), (4, 25)),
        ("column", (32, 100), (1, 25)),
        ("column", (16, 16), (1, 4)),
    ],
)
def test_units(case, unit, size, grid):
    masks = draw(case, 20, unit=unit, size=size, num_blocks=0)
    height, width = size[0] // grid[0], size[1] // grid[1]
    assert masks.grid.shape == (20, *grid) and masks.pixels.shape == (20, 1, *size)
    assert (masks.grid.sum(dim=(1, 2)) == int(0.7 * grid[0] * grid[1])).all()
    cells = masks.pixels[:, 0].unflatten(2, (grid[1], width)).unflatten(1, (grid[0], height))
    assert torch.equal(cells.amin(dim=(2, 4)), masks.grid) and torch.equal(cells.amax(dim=(2, 4)), masks.grid)


@one_case
def test_blocks_are_16_pixels_wide_full_height_and_uniform(case):
    grid = draw(case, 2900, mask_ratio=0.0).grid
    assert (grid.all(dim=1) == grid.any(dim=1)).all() and (grid.sum(dim=(1, 2)) == 8 * 4).all()
    start = grid[:, 0].int().argmax(dim=1)
    assert (grid[:, 0].gather(1, start[:, None] + 3)).all(), "the four columns are consecutive"
    counts = torch.bincount(start, minlength=29).double()
    assert len(counts) == 29
    assert ((counts - 100) ** 2 / 100).sum() < chi2.ppf(0.999, 28)


@one_case
def test_several_blocks_are_independent(case):
    columns = draw(case, 2000, mask_ratio=0.0, num_blocks=3).grid.any(dim=1).sum(dim=1)
    assert columns.min() < 12 and columns.max() == 12 and columns.min() >= 4


@one_case
def test_every_cell_is_equally_likely(case):
    count = 4000
    share = draw(case, count, num_blocks=0).grid.double().mean(dim=0)
    assert (share - 179 / 256).abs().max() < 5 * (0.7 * 0.3 / count) ** 0.5


@all_cases
def test_extreme_ratios(case):
    assert not draw(case, 3, mask_ratio=0.0, num_blocks=0).pixels.any()
    assert draw(case, 3, mask_ratio=1.0).pixels.all()
    assert draw(case, 0).grid.shape == (0, 8, 32)


@all_cases
def test_pure_function_of_seed_epoch_and_index(case):
    masks = draw(case, 30).grid
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).to(case.device)
    some = case(ops.draw_masks, order[:11], seed=1, epoch=0, **VIT)
    assert torch.equal(some.grid, masks[order[:11]])
    assert not torch.equal(draw(case, 30, epoch=1).grid, masks) and not torch.equal(draw(case, 30, seed=2).grid, masks)
    assert len(masks.flatten(1).unique(dim=0)) == 30


@all_cases
@pytest.mark.parametrize(
    ("seed", "epoch", "changes"),
    [
        (1, 0, {}),
        (0, 1, {"num_blocks": 3}),
        (2**64 - 1, 2**32 - 1, {"unit": "lattice", "size": (32, 100)}),
        (2**63, 16, {"unit": "stage3", "size": (32, 100), "mask_ratio": 0.31}),
        (2**31 + 5, 7, {"unit": "column", "size": (32, 100), "num_blocks": 2}),
        (5, 3, {"unit": "column", "size": (3, 16), "mask_ratio": 0.9}),
    ],
)
def test_every_backend_gives_the_same_bits(case, seed, epoch, changes):
    index = torch.tensor([0, 1, 77, 2**31, 2**32 + 3, 2**48 - 1])
    expected = ops.draw_masks(index, seed=seed, epoch=epoch, backend="reference", **(VIT | changes))
    for at in (epoch, torch.tensor(epoch, device=case.device)):
        masks = case(ops.draw_masks, index.to(case.device), seed=seed, epoch=at, **(VIT | changes))
        assert torch.equal(masks.grid.cpu(), expected.grid) and torch.equal(masks.pixels.cpu(), expected.pixels)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"index": torch.zeros(3)}, TypeError, "index must be an int64 tensor [B], got torch.float32"),
        ({"unit": "patch"}, ValueError, "unit must be one of token, lattice, stage3, column, got 'patch'"),
        ({"size": (32, 102)}, ValueError, "size must be a multiple of 4x4 (unit token), got 32x102"),
        ({"size": (36, 100), "unit": "stage3"}, ValueError, "size must be a multiple of 8x4 (unit stage3), got 36x100"),
        ({"size": (0, 100), "unit": "column"}, ValueError, "size must be a multiple of 0x4 (unit column), got 0x100"),
        ({"mask_ratio": 1.5}, ValueError, "mask_ratio must be in 0..1, got 1.5"),
        (
            {"num_blocks": -1},
            ValueError,
            "num_blocks must be 0 or more, and 0 below a width of 16, got -1 at width 128",
        ),
        ({"size": (32, 12)}, ValueError, "num_blocks must be 0 or more, and 0 below a width of 16, got 1 at width 12"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error) as caught:
        ops.draw_masks(**({"index": torch.arange(3), "seed": 0, "epoch": 0} | VIT | changes))
    assert str(caught.value) == f"draw_masks: {message}"


@all_cases
@pytest.mark.parametrize("changes", [{"num_blocks": 0}, {}, {"unit": "stage3", "size": (32, 100), "num_blocks": 2}])
def test_the_host_knows_the_share_of_visible_cells(case, changes):
    known = draw(case, 3, **changes).visible
    if case.backend != "reference":
        assert known == ops.draw_masks(torch.arange(3), seed=1, epoch=0, backend="reference", **(VIT | changes)).visible
        return
    found = 1 - draw(case, 4000, **changes).grid.double().mean().item()
    assert found == pytest.approx(known, abs=0.012 if changes.get("num_blocks") == 2 else 0.004)


@all_cases
def test_opcheck_and_compile(case):
    how = dict(seed=2**64 - 1, epoch=3, **VIT)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(index):
        return case(ops.draw_masks, index, **how).pixels.sum()

    index = torch.arange(2, device=case.device)
    assert step(index) == case(ops.draw_masks, index, **how).pixels.sum()
    if case.backend == "triton":
        module = importlib.import_module("rcmstr_fast.ops.draw_masks.triton")
        epoch = torch.tensor(3, device=case.device)
        torch.library.opcheck(module._draw, (index, epoch, str(2**64 - 1), [1, 8], [32, 4], 3, 1, 4))
