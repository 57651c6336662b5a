"""masked_mse: the mean over hidden values only."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcmstr_fast import ops
from tests.ops.cases import array, assert_near, cases, normal

all_cases = cases("masked_mse")
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def inputs(case, dtype, b=3, h=4, w=5, share=0.6):
    kwargs = {"dtype": dtype, "device": case.device}
    mask = torch.rand(b, 1, h, w, generator=torch.Generator().manual_seed(0)) < share
    return normal(b, 3, h, w, seed=1, **kwargs), normal(b, 3, h, w, seed=2, **kwargs), mask.to(case.device)


@all_cases
@dtypes
@settings(max_examples=15, deadline=None)
@given(b=st.integers(0, 3), h=st.integers(1, 6), w=st.integers(1, 6), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_value_and_gradient(case, dtype, b, h, w, share):
    prediction, target, mask = inputs(case, dtype, b, h, w, share)
    target.requires_grad_()
    loss = case(ops.masked_mse, prediction.requires_grad_(), target, mask)
    (2 * loss).backward()
    hidden = np.broadcast_to(array(mask), prediction.shape)
    difference = np.where(hidden, array(prediction) - array(target), 0)
    count = max(1, hidden.sum())
    assert_near(loss, (difference**2).sum() / count, dtype, "loss")
    assert_near(prediction.grad, 4 * difference / count, dtype, "gradient")
    assert target.grad is None and loss.dtype == dtype


@all_cases
def test_nan_at_visible_pixels_reaches_nothing(case):
    prediction, target, mask = inputs(case, torch.float32)
    clean = case(ops.masked_mse, prediction, target, mask)
    dirty = [t.masked_fill(~mask, torch.nan) for t in (prediction, target)]
    loss = case(ops.masked_mse, dirty[0].requires_grad_(), dirty[1], mask)
    loss.backward()
    assert torch.equal(loss, clean)
    assert (dirty[0].grad.masked_select(~mask) == 0).all() and dirty[0].grad.isfinite().all()


@all_cases
def test_nothing_hidden_is_zero_and_half_precision_is_widened(case):
    prediction, target, mask = inputs(case, torch.float32)
    assert case(ops.masked_mse, prediction, target, torch.zeros_like(mask)) == 0
    low = case(ops.masked_mse, prediction.bfloat16(), target, mask)
    assert low.dtype == torch.float32
    assert_near(low, case(ops.masked_mse, prediction.bfloat16().float(), target, mask), torch.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prediction": torch.zeros(2, 1, 4, 4)}, ValueError, "prediction must be [B, 3, H, W], got [2, 1, 4, 4]"),
        (
            {"target": torch.zeros(2, 3, 4, 5)},
            ValueError,
            "target must be [2, 3, 4, 4] like prediction, got [2, 3, 4, 5]",
        ),
        (
            {"target": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)},
            TypeError,
            "target must be a floating-point tensor [2, 3, 4, 4], got torch.uint8",
        ),
        (
            {"mask": torch.zeros(2, 4, 4, dtype=torch.bool)},
            ValueError,
            "mask must be [2, 1, 4, 4] like prediction, got [2, 4, 4]",
        ),
        ({"mask": torch.zeros(2, 1, 4, 4)}, TypeError, "mask must be a bool tensor [2, 1, 4, 4], got torch.float32"),
        (
            {"mask": torch.zeros(2, 1, 4, 4, device="meta").bool()},
            ValueError,
            "mask must be on cpu like prediction, got meta",
        ),
    ],
)
def test_bad_arguments(changes, error, message):
    arguments = {
        "prediction": torch.zeros(2, 3, 4, 4),
        "target": torch.zeros(2, 3, 4, 4),
        "mask": torch.zeros(2, 1, 4, 4, dtype=torch.bool),
    }
    with pytest.raises(error) as caught:
        ops.masked_mse(**(arguments | changes))
    assert str(caught.value) == f"masked_mse: {message}"
