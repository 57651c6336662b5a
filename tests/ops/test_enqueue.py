"""enqueue_: a ring buffer like a loop over keys."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcmstr_fast import ops
from tests.ops.cases import cases

all_cases = cases("enqueue_")


@all_cases
@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 9), counts=st.lists(st.integers(0, 25), max_size=4))
def test_same_as_one_key_at_a_time(case, size, counts):
    queue = torch.zeros(size, 2, device=case.device)
    pointer = torch.tensor(0, device=case.device)
    expected, place, value = queue.clone(), 0, 1.0
    for count in counts:
        keys = torch.arange(2 * count, device=case.device).view(count, 2) + value
        case(ops.enqueue_, queue, pointer, keys)
        for key in keys:
            expected[place] = key
            place = (place + 1) % size
        value += 2 * count
        assert torch.equal(queue, expected) and pointer.item() == place


@all_cases
def test_in_place_cast_and_without_a_graph(case):
    queue = torch.zeros(5, 3, dtype=torch.float16, device=case.device)
    pointer = torch.tensor(4, device=case.device)
    storage = queue.data_ptr(), pointer.data_ptr()
    keys = torch.full((2, 3), 0.1, device=case.device, requires_grad=True)
    assert case(ops.enqueue_, queue, pointer, keys) is None
    assert (queue.data_ptr(), pointer.data_ptr()) == storage and not queue.requires_grad
    assert (queue[[4, 0]] == torch.tensor(0.1).half().item()).all() and (queue[1:4] == 0).all()
    assert pointer.item() == 1 and pointer.dtype == torch.int64


@all_cases
def test_no_host_synchronisation(case):
    if case.device == "cpu":  # fails where a value would have to be read
        from torch._subclasses.fake_tensor import FakeTensorMode

        if case.backend != "reference":
            pytest.skip("only plain PyTorch runs on fake tensors")
        with FakeTensorMode():
            case(ops.enqueue_, torch.zeros(5, 3), torch.zeros((), dtype=torch.int64), torch.zeros(7, 3))
        return
    queue, pointer = torch.zeros(5, 3, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    keys = torch.ones(7, 3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        case(ops.enqueue_, queue, pointer, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.zeros(0, 3), torch.tensor(0), torch.zeros(1, 3)),
            ValueError,
            "queue must have K >= 1 rows, got [0, 3]",
        ),
        ((torch.zeros(5, 3), torch.tensor([0]), torch.zeros(1, 3)), ValueError, "pointer must be [], got [1]"),
        ((torch.zeros(5, 3), 0, torch.zeros(1, 3)), TypeError, "pointer must be a tensor [], got int"),
        (
            (torch.zeros(5, 3), torch.tensor(0.0), torch.zeros(1, 3)),
            TypeError,
            "pointer must be an int64 tensor [], got torch.float32",
        ),
        (
            (torch.zeros(5, 3), torch.tensor(0), torch.zeros(1, 4)),
            ValueError,
            "keys must be [n, 3] like queue, got [1, 4]",
        ),
        (
            (torch.zeros(5, 3), torch.tensor(0, device="meta"), torch.zeros(1, 3)),
            ValueError,
            "pointer must be on cpu like queue, got meta",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        ops.enqueue_(*arguments)
    assert str(caught.value) == f"enqueue_: {message}"


def test_debug_checks_pointer_and_keys(monkeypatch):
    monkeypatch.setenv("RCMSTR_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match=r"enqueue_: pointer must be in 0\.\.4, got 5\.\.5"):
        ops.enqueue_(torch.zeros(5, 3), torch.tensor(5), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="enqueue_: keys must be finite"):
        ops.enqueue_(torch.zeros(5, 3), torch.tensor(0), torch.full((1, 3), math.nan))
