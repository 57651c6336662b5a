"""momentum_update_: the moving average, in place."""

import pytest
import torch

from rcmstr_fast import ops
from tests.ops.cases import assert_near, cases, normal

all_cases = cases()
SHAPES = [(3, 4), (), (5,), (2, 3, 3, 3), (0,)]


def lists(case, dtype=torch.float32):
    return (
        [normal(*shape, seed=seed + i, dtype=dtype, device=case.device) for i, shape in enumerate(SHAPES)]
        for seed in (0, 50)
    )


@all_cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [0.0, 0.3, 0.999, 1.0])
def test_average(case, dtype, m):
    target, source = lists(case, dtype)
    expected = [m * t.double() + (1 - m) * s.double() for t, s in zip(target, source)]
    places, given = [t.data_ptr() for t in target], [s.clone() for s in source]
    case(ops.momentum_update_, target, source, m)
    for t, e in zip(target, expected):
        assert_near(t, e, dtype)
    assert [t.data_ptr() for t in target] == places
    assert all(torch.equal(a, b) for a, b in zip(source, given))


@all_cases
def test_equal_parameters_stay_equal(case):
    _, source = lists(case)
    target = [s.clone() for s in source]
    for _ in range(20):
        case(ops.momentum_update_, target, source, 0.999)
    assert all(torch.equal(t, s) for t, s in zip(target, source))


@all_cases
def test_parameters_record_no_graph(case):
    target, source = lists(case)
    trained = [torch.nn.Parameter(s) for s in source]
    frozen = [torch.nn.Parameter(t, requires_grad=False) for t in target]
    case(ops.momentum_update_, frozen, trained, 0.5)
    assert not any(t.requires_grad for t in frozen)
    case(ops.momentum_update_, [], [], 0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([torch.zeros(2)], [], 0.9), ValueError, "source must have 1 tensors like target, got 0"),
        (([torch.zeros(2)], [torch.zeros(3)], 0.9), ValueError, "source[0] must be [2] like target[0], got [3]"),
        (([torch.zeros(2)], [torch.zeros(2)], 1.1), ValueError, "m must be in 0..1, got 1.1"),
        (
            ([torch.zeros(2)], [torch.zeros(2).half()], 0.9),
            TypeError,
            "source[0] must be torch.float32 like target[0], got torch.float16",
        ),
        (
            ([torch.zeros(2).long()], [torch.zeros(2).long()], 0.9),
            TypeError,
            "target[0] must be a floating-point tensor [2], got torch.int64",
        ),
        (
            ([torch.zeros(2)], [torch.zeros(2, device="meta")], 0.9),
            ValueError,
            "source[0] must be on cpu like target[0], got meta",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error) as caught:
        ops.momentum_update_(*arguments)
    assert str(caught.value) == f"momentum_update_: {message}"
