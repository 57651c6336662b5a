"""Metrics against values worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcmstr_fast.evaluation.metrics import Score, mean, score


def test_by_hand():
    labels = ["abc", "abc", "kitten", "new york"]
    predictions = ["abc", "abd", "sitting", "new yorx"]
    result = score(labels, predictions)
    assert result.count == 4
    assert result.accuracy == 1 / 4
    assert result.ed1 == 3 / 4
    assert result.ned == pytest.approx(1 - (0 + 1 / 3 + 3 / 7 + 1 / 8) / 4)
    assert result.cer == pytest.approx((0 + 1 + 3 + 1) / (3 + 3 + 6 + 8))
    assert result.wer == pytest.approx((0 + 1 + 1 + 1) / 5)


def test_empty_strings():
    assert score([""], [""]) == Score(1, 1.0, 1.0, 1.0, 0.0, 0.0)
    one_side = score(["", "ab"], ["xy", ""])
    assert (one_side.accuracy, one_side.ed1, one_side.ned) == (0.0, 0.0, 0.0)
    assert one_side.cer == 4 / 2
    assert one_side.wer == 2 / 1


def test_code_points_not_bytes():
    assert score(["深圳"], ["深川"]).cer == 0.5


def test_means():
    a, b = Score(1, 1.0, 1.0, 1.0, 0.0, 0.0), Score(3, 0.0, 0.5, 0.25, 1.0, 1.0)
    assert mean([a, b]) == Score(4, 0.5, 0.75, 0.625, 0.5, 0.5)
    assert mean([a, b], weighted=True) == Score(4, 0.25, 0.625, 0.4375, 0.75, 0.75)


@pytest.mark.parametrize("labels, predictions", [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_bad_lengths(labels, predictions):
    with pytest.raises(ValueError, match="score: expected as many predictions as labels"):
        score(labels, predictions)


def test_mean_of_nothing():
    with pytest.raises(ValueError, match="at least one"):
        mean([])


@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), min_size=1, max_size=8))
def test_bounds(pairs):
    labels, predictions = map(list, zip(*pairs))
    result = score(labels, predictions)
    assert 0 <= result.accuracy <= result.ed1 <= 1
    assert result.accuracy <= result.ned + 1e-12 and result.ned <= 1
    assert score(labels, labels).accuracy == score(labels, labels).ned == 1
