"""The picture of who imports whom is that of the sources, and there is no circle."""

import pytest

from bench.import_graph import PICTURE, edges, ranks, reduced, svg


def test_the_picture_is_fresh():
    assert PICTURE.read_text(encoding="utf-8") == svg(), "run python -m bench.import_graph"


def test_chains_are_short_and_without_circles():
    assert max(ranks(edges()).values()) <= 12
    with pytest.raises(ValueError, match="circle of imports: a -> b -> a"):
        ranks({"a": {"b"}, "b": {"a"}})


def test_arrows_that_a_longer_way_shows_are_left_out():
    assert reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
