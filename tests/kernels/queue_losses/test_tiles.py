"""How work is cut: pure functions of shapes and device."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcmstr_fast.kernels.architectures import FAMILIES, KNOWN
from rcmstr_fast.kernels.queue_losses import tiles


def test_default_temperatures_share_a_root():
    assert tiles.power_ratio(0.07, 0.04) == (4, 7)
    assert tiles.power_ratio(0.1, 0.1) == (1, 1)
    assert tiles.power_ratio(0.07, 0.0401) == (0, 0)
    assert tiles.power_ratio(1.0, 0.02) == (0, 0)
    assert tiles.power_ratio(0.02, 1.0) == (0, 0)


@given(st.integers(1, 8), st.integers(1, 8))
def test_every_small_ratio_is_found(n_info, n_kl):
    n_info, n_kl = n_info // math.gcd(n_info, n_kl), n_kl // math.gcd(n_info, n_kl)
    assert tiles.power_ratio(0.01 * n_kl, 0.01 * n_info) == (n_info, n_kl)


@given(st.integers(1, 400), st.integers(1, 2048), st.sampled_from([4, 108, 132, 264]), st.integers(1, 200 << 20))
def test_split_stays_within_its_limits(row_tiles, key_tiles, slots, size):
    parts = tiles.split(row_tiles, key_tiles, slots, size)
    assert 1 <= parts <= min(64, key_tiles)
    assert parts == 1 or parts * size <= tiles.WORKSPACE_BYTES
    waves = row_tiles * parts / slots
    assert waves / math.ceil(waves) >= row_tiles / slots / math.ceil(row_tiles / slots) - 1e-9


@pytest.mark.parametrize("multiprocessors", [108, 132])
def test_the_frame_term_fills_the_device(multiprocessors):
    parts = tiles.split(104, 1024, multiprocessors, 2 * 13312 * 128 * 4)
    assert 104 * parts / multiprocessors / math.ceil(104 * parts / multiprocessors) > 0.9


def test_every_width_has_a_tile():
    for family in FAMILIES:
        for width in tiles.WIDTHS:
            for kind in ("stats", "gradient"):
                assert tiles.tile(kind, family, width, 2).queries in (1, 2)
                assert tiles.tile(kind, family, width, 1).queries == 1


def test_operands_of_every_tile_fit_the_shared_memory_of_its_family():
    """What a program holds at least: its queries and keys, and a block of the queue for each buffer."""
    limits = {one.family: one.shared for one in reversed(KNOWN.values())}
    for table in (tiles.STATS, tiles.GRADIENT):
        for (family, width, _), tile in table.items():
            rows = tile.block_m * (1 + tile.queries) + tile.block_n * max(1, tile.num_stages - 1)
            assert 2 * rows * width <= limits[family], (family, width, tile)
