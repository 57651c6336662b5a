"""hierarchical_pool: windows, order undone, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcmstr_fast import ops
from tests.ops.cases import array, assert_near, cases, normal
from tests.oracles.strips import pooling_windows

all_cases = cases("hierarchical_pool")
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def test_windows_of_the_specification():
    assert pooling_windows(26, 4) == [(0, 7), (6, 13), (13, 20), (19, 26)]
    assert pooling_windows(32, 4) == [(0, 8), (8, 16), (16, 24), (24, 32)]


@all_cases
@dtypes
@settings(max_examples=15, deadline=None)
@given(b=st.integers(0, 3), t=st.integers(1, 33), c=st.integers(1, 5), data=st.data())
def test_levels_match_the_windows(case, dtype, b, t, c, data):
    s = data.draw(st.integers(1, t))
    frames = normal(b, t, c, seed=0, dtype=dtype, device=case.device)
    pooled = case(ops.hierarchical_pool, frames, s)
    assert torch.equal(pooled.frame, frames)
    for i, (start, end) in enumerate(pooling_windows(t, s)):
        assert_near(pooled.subword[:, i], array(frames)[:, start:end].mean(axis=1), dtype, f"window {i}")
    assert pooled.subword.shape == (b, s, c) and pooled.subword.dtype == dtype
    assert_near(pooled.word, array(frames).mean(axis=1, keepdims=True), dtype, "word")


@all_cases
@dtypes
def test_order_is_undone_before_pooling(case, dtype):
    frames = normal(4, 26, 3, seed=1, dtype=dtype, device=case.device)
    index = torch.arange(4, device=case.device)
    order = ops.draw_order(index, seed=5, epoch=0, num_patches=2, group_size=2)
    restored = ops.restore_frames(frames, order, num_patches=2, group_size=2)
    assert not torch.equal(restored, frames)
    for a, b in zip(case(ops.hierarchical_pool, frames, 4, order=order), case(ops.hierarchical_pool, restored, 4)):
        assert_near(a, b, dtype)


@all_cases
def test_gradcheck(case):
    frames = normal(2, 6, 2, seed=2, dtype=torch.float64, device=case.device).requires_grad_()
    order = torch.tensor([[3, 0], [1, 2]], device=case.device)
    assert torch.autograd.gradcheck(lambda x: tuple(case(ops.hierarchical_pool, x, 4, order=order)), (frames,))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3), 1), ValueError, "frames must be [B, T, C], got [2, 3]"),
        ((torch.zeros(2, 6, 3), 0), ValueError, "num_subwords must be in 1..6, got 0"),
        ((torch.zeros(2, 6, 3), 7), ValueError, "num_subwords must be in 1..6, got 7"),
        ((torch.zeros(2, 6, 3), 2.5), TypeError, "num_subwords must be an int, got float"),
        (
            (torch.zeros(2, 6, 3), 4, torch.zeros(3, 2, dtype=torch.int64)),
            ValueError,
            "order must be [2, N] like frames, got [3, 2]",
        ),
        (
            (torch.zeros(2, 6, 3), 4, torch.zeros(2, 4, dtype=torch.int64)),
            ValueError,
            "N of order must divide the number of frames 6, got 4",
        ),
        (
            (torch.zeros(2, 6, 3), 4, torch.zeros(2, 2)),
            TypeError,
            "order must be an int64 tensor [2, N], got torch.float32",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    frames, num_subwords, order = (*arguments, None)[:3]
    with pytest.raises(error) as caught:
        ops.hierarchical_pool(frames, num_subwords, order=order)
    assert str(caught.value) == f"hierarchical_pool: {message}"
