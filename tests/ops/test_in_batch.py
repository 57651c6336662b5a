"""In-batch InfoNCE: against loops written from the formula, on every backend; memory; two-sided gradients."""

import math

import pytest
import torch

from rcmstr_fast import ops
from rcmstr_fast.ops.in_batch import chunked, reference
from tests.ops.cases import array, assert_near, cases, unit_rows


def loops(query, candidates, positive, temperature, skip=None):
    """The mean loss from the formula, a row and a candidate at a time, in Python floats."""
    q, c = array(query), array(candidates)
    total = 0.0
    for i, row in enumerate(q):
        logits = [float(row @ other) / temperature for other in c]
        kept = [x for j, x in enumerate(logits) if skip is None or j != int(skip[i])]
        total += math.log(sum(map(math.exp, kept))) - logits[int(positive[i])]
    return total / len(q)


def maps(rows, number, seed, skipping):
    generator = torch.Generator().manual_seed(seed)
    positive = torch.randint(number, (rows,), generator=generator)
    skip = (positive + 1 + torch.randint(number - 1, (rows,), generator=generator)) % number if skipping else None
    return positive, skip


@cases("info_nce")
@pytest.mark.parametrize("rows, number, skipping", [(1, 2, True), (3, 5, False), (65, 67, True), (130, 40, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_loss_and_gradients(case, rows, number, skipping, dtype):
    width, device = case.width(24), case.device
    query, candidates = (unit_rows(n, width, seed, dtype=dtype) for n, seed in ((rows, 0), (number, 1)))
    positive, skip = maps(rows, number, 2, skipping)
    exact = [x.double().requires_grad_() for x in (query, candidates)]
    expected = reference.info_nce(*exact, positive, temperature=0.1, skip=skip)
    assert float(expected.detach()) == pytest.approx(loops(*exact, positive, 0.1, skip), rel=1e-12)
    (3 * expected).backward()

    given = [x.to(device).requires_grad_() for x in (query, candidates)]
    places = [None if x is None else x.to(device) for x in (positive, skip)]
    loss = case(ops.info_nce, *given, places[0], temperature=0.1, skip=places[1])
    (3 * loss).backward()
    precision = case.precision(dtype)
    assert loss.dtype == torch.float32
    assert_near(loss, expected, precision, "loss")
    for name, got, want in zip(("query", "candidates"), given, exact, strict=True):
        assert got.grad.dtype == dtype
        assert_near(got.grad, want.grad, precision, f"gradient of {name}")


@cases("info_nce")
def test_nt_xent_is_the_formula_of_simclr(case):
    a, b = (unit_rows(7, case.width(16), seed) for seed in (3, 4))
    rows = torch.cat([a, b])
    positive = [(i + 7) % 14 for i in range(14)]
    expected = loops(rows, rows, positive, 0.5, list(range(14)))
    got = case(ops.nt_xent, a.float().to(case.device), b.float().to(case.device), 0.5)
    assert_near(got, expected, case.precision(torch.float32))
    assert_near(reference.nt_xent(a, b, temperature=0.5), expected, torch.float64)


def test_gathered_candidates_equal_one_process():
    """Two halves of a batch whose candidates are gathered give the loss and gradients of the whole batch."""
    whole = [unit_rows(6, 16, seed).requires_grad_() for seed in (5, 6)]
    ops.nt_xent(*whole, 0.2).backward()
    split = [x.detach().clone().requires_grad_() for x in whole]
    total = 0.0
    for rank in (0, 1):
        mine = [x[3 * rank : 3 * rank + 3] for x in split]
        rest = iter(split)
        total = total + ops.nt_xent(*mine, 0.2, gather=lambda _, rest=rest: next(rest), rank=rank) / 2
    total.backward()
    for got, want in zip(split, whole, strict=True):
        assert_near(got.grad, want.grad, torch.float64)


def test_detached_candidates_get_no_gradient():
    query, keys = unit_rows(4, 8, 0).requires_grad_(), unit_rows(4, 8, 1)
    ops.info_nce(query, keys, torch.arange(4), temperature=0.2).backward()
    assert query.grad is not None and keys.grad is None


def test_chunks_give_the_same(monkeypatch):
    a, b = (unit_rows(50, 16, seed).requires_grad_() for seed in (0, 1))
    ops.nt_xent(a, b, 0.1, backend="chunked").backward()
    once = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 1)
    ops.nt_xent(a, b, 0.1, backend="chunked").backward()
    assert_near(a.grad, once[0], torch.float64)
    assert_near(b.grad, once[1], torch.float64)


def test_no_buffer_of_all_similarities():
    """2 x 1,280 windows: nothing as large as (2 N)^2 is made, in forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.numel())
            return result

    a, b = (unit_rows(1280, 64, seed, dtype=torch.float32).requires_grad_() for seed in (0, 1))
    with Largest() as seen:
        ops.nt_xent(a, b, 0.1).backward()
    assert 0 < seen.elements <= 2 * chunked.CHUNK_ELEMENTS < 2560**2


def test_compiles_and_checks_as_an_operator():
    from rcmstr_fast.ops.in_batch.backends import _operator

    a = unit_rows(5, 8, 0, dtype=torch.float32).requires_grad_()
    b = unit_rows(6, 8, 1, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(_operator, (a, b, torch.arange(5), None, 0.2, True, "chunked"))


@pytest.mark.parametrize(
    "change, error",
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"b": torch.zeros(3, 8)}, r"b must be \[2, 8\] like a"),
        ({"a": torch.zeros(1, 8), "b": torch.zeros(1, 8)}, "2 or more rows"),
    ],
)
def test_bad_input(change, error):
    with pytest.raises(ValueError, match="(nt_xent|info_nce): .*" + error):
        ops.nt_xent(**{"a": torch.zeros(2, 8), "b": torch.zeros(2, 8), "temperature": 0.1} | change)
