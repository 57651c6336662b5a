"""The rows of the chunked queue losses in C++ against the same in PyTorch (float64)."""

import pytest
import torch

from rcmstr_fast.ops import native
from rcmstr_fast.ops.queue_losses.chunked import _compiled_rows, _Info, _rows

pytestmark = pytest.mark.skipif(not native.has("loss_rows"), reason="the extension rcmstr_fast._C is not built")


def chunk(rows: int, keys: int, spread: float = 8.0, seed: int = 0):
    """Similarities of queries and keys, softmax of the latter, positives."""
    draw = torch.Generator().manual_seed(seed)
    a, b = (spread * (2 * torch.rand(rows, keys, generator=draw, dtype=torch.float64) - 1) for _ in range(2))
    return a, b, torch.softmax(b, dim=1), spread * torch.rand(rows, generator=draw, dtype=torch.float64)


def both(a, b, p, positive, *, place=None, with_gradient=True):
    """Results in float64 by PyTorch and in float32 by C++."""
    found = []
    for dtype, run in ((torch.float64, _rows), (torch.float32, _compiled_rows)):
        info = None if positive is None else _Info(positive.to(dtype), 0.6, 0.3)
        found.append(run(a.to(dtype).clone(), b.to(dtype), p.to(dtype), place, 0.7, info, with_gradient))
    return found


@pytest.mark.parametrize("rows, keys", [(1, 1), (3, 7), (5, 8), (2, 1000), (64, 4096), (2, 70001)])
@pytest.mark.parametrize("kind", ["both", "kl"])
@pytest.mark.parametrize("spread", [1.0, 25.0])
def test_against_float64(rows, keys, kind, spread):
    a, b, p, positive = chunk(rows, keys, spread)
    expected, found = both(a, b, p, positive if kind == "both" else None)
    assert len(found.info) == len(found.rest) == (rows if kind == "both" else 0)
    for name in ("kl", "info", "rest"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=5e-6, atol=5e-6)
    scale = expected.weight.abs().amax(dim=1, keepdim=True)
    assert ((found.weight - expected.weight).abs() <= 1e-5 * scale).all()
    assert found.weight.dtype == torch.float32


def test_rows_of_keys_may_be_shared():
    a, b, p, _ = chunk(12, 333)
    place = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 4, 0])
    expected, found = both(a, b[:5], p[:5], None, place=place)
    torch.testing.assert_close(found.kl.double(), expected.kl, rtol=5e-6, atol=5e-6)
    torch.testing.assert_close(found.weight.double(), expected.weight, rtol=1e-5, atol=1e-7)


def test_a_positive_above_all_others_keeps_its_digits():
    a, b, p, _ = chunk(4, 50, spread=1.0)
    expected, found = both(a, b, p, torch.full((4,), 30.0, dtype=torch.float64))
    assert (expected.info > 0).all()
    torch.testing.assert_close(found.info.double(), expected.info, rtol=1e-4, atol=0)


def test_without_gradient_there_is_no_weight():
    expected, found = both(*chunk(3, 20), with_gradient=False)
    assert expected.weight is None and found.weight is None
    torch.testing.assert_close(found.info.double(), expected.info, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("place", [0, 9, 20])
def test_nan_spoils_its_row_alone(place):
    a, b, p, positive = chunk(3, 21)
    a[1, place] = float("nan")
    _, found = both(a, b, p, positive)
    for values in (found.kl, found.info, found.rest, found.weight.sum(dim=1)):
        assert torch.isnan(values).tolist() == [False, True, False]


def test_threads_do_not_matter():
    made, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(both(*chunk(40, 2000))[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*made))
