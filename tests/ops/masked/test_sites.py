"""active_sites: the rules of every stage against a site-by-site oracle."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcmstr_fast import ops
from tests.ops.cases import array, cases
from tests.oracles import sparse

all_cases = cases()
rules = pytest.mark.parametrize("rule", ["anchored", "any"])
CNN = {
    100: [(32, 100), (16, 50), (8, 25), (4, 26), (2, 27), (1, 26)],
    128: [(32, 128), (16, 64), (8, 32), (4, 33), (2, 34), (1, 33)],
}


def drawn(case, unit, width, count=4):
    index = torch.arange(count, device=case.device)
    return ops.draw_masks(index, seed=1, epoch=0, size=(32, width), unit=unit, mask_ratio=0.7, num_blocks=1)


@all_cases
@rules
@pytest.mark.parametrize("unit", ["lattice", "stage3", "column"])
@pytest.mark.parametrize("width", [100, 128])
def test_stages_of_the_cnn_match_the_oracle(case, rule, unit, width):
    masks = drawn(case, unit, width)
    sites = case(ops.active_sites, masks.grid, CNN[width], rule)
    assert [tuple(s.active.shape) for s in sites] == [(4, 1, *stage) for stage in CNN[width]]
    assert torch.equal(sites[0].active, ~masks.pixels)
    for before, now in itertools.pairwise(sites):
        assert torch.equal(now.source, before.active)
        size = tuple(now.active.shape[2:])
        expected = sparse.carry(array(before.active)[:, 0], size, rule)
        assert (array(now.active)[:, 0] == expected).all(), size
    assert sites[0].source is None


@all_cases
@settings(max_examples=30, deadline=None)
@given(data=st.data(), rule=st.sampled_from(["anchored", "any"]), h=st.integers(1, 9), w=st.integers(1, 9))
def test_one_step_matches_the_oracle(case, data, rule, h, w):
    divisors = [[size for size in range(1, n + 2) if size >= n - 1 or n % size == 0] for n in (h, w)]
    size = tuple(data.draw(st.sampled_from(choices)) for choices in divisors)
    hidden = torch.tensor(data.draw(st.lists(st.booleans(), min_size=h * w, max_size=h * w))).view(1, h, w)
    _, now = case(ops.active_sites, hidden.to(case.device), [(h, w), size], rule)
    if size[0] % h == 0 and size[1] % w == 0:
        expected = np.kron(~array(hidden), np.ones((1, size[0] // h, size[1] // w), dtype=bool))
    else:
        expected = sparse.carry(~array(hidden), size, rule)
    assert (array(now.active)[:, 0] == expected).all()


@all_cases
def test_anchored_keeps_the_active_share_and_any_grows_it(case):
    """Without a block: 30 of 100 cells active; 25 to 26 columns keeps 0.30 or makes it about 0.50."""
    index = torch.arange(2000, device=case.device)
    grid = ops.draw_masks(index, seed=1, epoch=0, size=(32, 100), unit="stage3", mask_ratio=0.7, num_blocks=0).grid
    shares = {}
    for rule in ("anchored", "any"):
        sites = case(ops.active_sites, grid, CNN[100], rule)
        shares[rule] = sites[3].active.double().mean().item()
        if rule == "anchored":
            assert torch.equal(sites[3].active[:, 0, :, :25], ~grid)
            assert torch.equal(sites[3].active[:, 0, :, 25], ~grid[:, :, 24])
    assert shares["anchored"] == pytest.approx(0.30, abs=0.005)
    assert shares["any"] == pytest.approx(0.50, abs=0.01)


@all_cases
@rules
def test_all_visible_and_all_hidden_stay_so(case, rule):
    for hidden in (False, True):
        grid = torch.full((2, 4, 25), hidden, device=case.device)
        for sites in case(ops.active_sites, grid, CNN[100], rule):
            assert (sites.active != hidden).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 4, 25), CNN[100]), TypeError, "mask must be a bool tensor [B, gh, gw], got torch.float32"),
        ((torch.zeros(2, 1, 4, 25).bool(), CNN[100]), ValueError, "mask must be [B, gh, gw], got [2, 1, 4, 25]"),
        ((torch.zeros(2, 4, 25).bool(), CNN[100], "all"), ValueError, "rule must be one of anchored, any, got 'all'"),
        (
            (torch.zeros(2, 4, 25).bool(), [(8, 25), (4, 28)]),
            ValueError,
            "stages must each be a multiple of the mask's 4x25 or follow from the stage before it by / n, + 1 or - 1 "
            "an axis, got 4x28 after 8x25",
        ),
        (
            (torch.zeros(2, 4, 25).bool(), [(0, 25)]),
            ValueError,
            "stages must each be a multiple of the mask's 4x25 or follow from the stage before it by / n, + 1 or - 1 "
            "an axis, got 0x25 after 4x25",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        ops.active_sites(*arguments)
    assert str(caught.value) == f"active_sites: {message}"
