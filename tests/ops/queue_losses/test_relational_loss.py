"""relational_loss: values, gradients and analytic properties (paper Eq. 1-4)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rcmstr_fast import ops
from tests.ops.cases import array, assert_near, cases, unit_rows
from tests.oracles import relations

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")  # the interpreter
all_cases = cases("relational_losses")
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def inputs(m, k, d, case, dtype=torch.float32):
    """query, key, queue, second query: unit rows, the keys near the queries."""
    kwargs, d = {"dtype": dtype, "device": case.device}, case.width(d)
    query = unit_rows(m, d, 1, **kwargs)
    key = F.normalize(query + 0.5 * unit_rows(m, d, 2, **kwargs), dim=1)
    return query, key, unit_rows(k, d, 3, **kwargs), unit_rows(m, d, 4, **kwargs)


@all_cases
@dtypes
@settings(max_examples=15, deadline=None)
@given(m=st.integers(1, 9), k=st.integers(1, 40), d=st.integers(1, 20), permuted=st.booleans())
def test_values_match_the_oracle(case, dtype, m, k, d, permuted):
    query, key, queue, second = inputs(m, k, d, case, dtype)
    result = case(ops.relational_loss, query, key, queue, query_permuted=second if permuted else None)
    queries = [array(query)] + [array(second)] * permuted
    info = np.mean([relations.info_nce(q, array(key), array(queue), 0.07) for q in queries])
    kl = np.mean([relations.symmetric_kl(q, array(key), array(queue), 0.04) for q in queries])
    assert_near(result.info, info, case.precision(dtype), "info")
    assert_near(result.kl, kl, case.precision(dtype), "kl")
    assert_near(result.loss, info + 0.3 * kl, case.precision(dtype), "loss")
    assert {r.dtype for r in result} == {dtype}


@all_cases
@dtypes
def test_gradient_matches_the_streaming_oracle(case, dtype):
    query, key, queue, _ = inputs(7, 33, 12, case, dtype)
    (2 * case(ops.relational_loss, query.requires_grad_(), key, queue, alpha=0.3).loss).backward()
    rows = []
    for q, p in zip(array(query), array(key)):
        kl = relations.streaming_kl(q, p, array(queue), 0.04, block=10)[1]
        rows.append(2 / 7 * (relations.info_gradient(q, p, array(queue), 0.07) + 0.3 * kl))
    assert_near(query.grad, np.stack(rows), case.precision(dtype), "gradient of the loss")


@all_cases
def test_only_the_loss_carries_a_gradient(case):
    query, key, queue, second = inputs(3, 5, 4, case)
    result = case(ops.relational_loss, query.requires_grad_(), key, queue, query_permuted=second)
    assert result.loss.requires_grad and not result.info.requires_grad and not result.kl.requires_grad


@all_cases
def test_gradcheck(case):
    query, key, queue, second = inputs(3, 5, 4, case, torch.float64)

    def both(q, e):
        return case(ops.relational_loss, q, key, queue, query_permuted=e, tau_info=0.2, tau_kl=0.15).loss

    assert torch.autograd.gradcheck(both, (query.requires_grad_(), second.requires_grad_()))


@all_cases
@dtypes
def test_alpha_zero_is_cross_entropy(case, dtype):
    query, key, queue, _ = inputs(6, 21, 8, case, dtype)
    mine, theirs = query.clone().requires_grad_(), query.clone().requires_grad_()
    result = case(ops.relational_loss, mine, key, queue, alpha=0.0)
    logits = torch.cat([(theirs * key).sum(1, keepdim=True), theirs @ queue.T], dim=1) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(6, dtype=torch.long, device=case.device))
    (2 * result.loss).backward()
    (2 * expected).backward()
    assert_near(result.loss, expected, case.precision(dtype), "loss")
    assert_near(mine.grad, theirs.grad, case.precision(dtype), "gradient")


@all_cases
def test_queue_of_zeros(case):
    query, key, queue, _ = inputs(5, 17, 8, case, torch.float32)
    result = case(ops.relational_loss, query, key, torch.zeros_like(queue))
    s = array(query * key).sum(1) / 0.07
    assert_near(result.info, np.mean(np.log(17 + np.exp(s)) - s), torch.float32)
    assert result.kl.item() == pytest.approx(0.0, abs=1e-6)


@all_cases
@dtypes
def test_one_queue_row_and_equal_rows_have_no_kl(case, dtype):
    query, key, queue, _ = inputs(5, 1, 8, case, dtype)
    assert_near(case(ops.relational_loss, query, key, queue).kl, 0.0, case.precision(dtype), "K = 1")
    query, _, queue, _ = inputs(5, 30, 8, case, dtype)
    gradients = []
    for alpha in (0.0, 1.0):
        leaf = query.clone().requires_grad_()
        result = case(ops.relational_loss, leaf, query, queue, alpha=alpha)
        result.loss.backward()
        gradients.append(leaf.grad)
    assert_near(result.kl, 0.0, case.precision(dtype), "query = key")
    assert_near(gradients[1], gradients[0], case.precision(dtype), "the KL is at its minimum")


@all_cases
@dtypes
def test_unchanged_by_reordering_the_queue(case, dtype):
    query, key, queue, second = inputs(6, 50, 8, case, dtype)
    shuffled = queue[torch.randperm(50, generator=torch.Generator().manual_seed(0)).to(case.device)]
    first = case(ops.relational_loss, query, key, queue, query_permuted=second)
    for a, b in zip(first, case(ops.relational_loss, query, key, shuffled, query_permuted=second)):
        assert_near(a, b, case.precision(dtype))


@all_cases
def test_two_queries_are_the_mean_of_each(case):
    query, key, queue, second = inputs(6, 50, 8, case)
    both = case(ops.relational_loss, query, key, queue, query_permuted=second)
    one, other = (case(ops.relational_loss, q, key, queue) for q in (query, second))
    for got, a, b in zip(both, one, other):
        assert_near(got, (a + b) / 2, case.precision(torch.float32))


@all_cases
def test_gradient_goes_to_the_queries_only(case):
    tensors = inputs(6, 50, 8, case)
    query, key, queue, second = (t.requires_grad_() for t in tensors)
    case(ops.relational_loss, query, key, queue, query_permuted=second).loss.backward()
    assert key.grad is None and queue.grad is None
    assert query.grad.abs().sum() > 0 and second.grad.abs().sum() > 0


@all_cases
def test_queue_overwritten_before_backward(case):
    query, key, queue, second = inputs(6, 20, 8, case)
    gradients = []
    for overwrite in (False, True):
        q, e, rows = query.clone().requires_grad_(), second.clone().requires_grad_(), queue.clone()
        result = case(ops.relational_loss, q, key, rows, query_permuted=e)
        if overwrite:
            pointer = torch.tensor(3, device=case.device)
            ops.enqueue_(rows, pointer, torch.full((9, rows.shape[1]), float("nan"), device=case.device))
        result.loss.backward()
        gradients.append((q.grad, e.grad))
    for a, b in zip(*gradients):
        assert torch.equal(a, b) and a.isfinite().all()


@all_cases
@pytest.mark.parametrize("poisoned", range(4), ids=["query", "key", "queue", "query_permuted"])
def test_nan_in_nan_out(case, poisoned):
    tensors = list(inputs(6, 20, 8, case))
    tensors[poisoned][2, 3] = float("nan")
    result = case(ops.relational_loss, *tensors[:3], query_permuted=tensors[3])
    assert result.loss.isnan() and result.kl.isnan()


@all_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_computed_in_float32(case, dtype):
    query, key, queue, _ = (t.to(dtype) for t in inputs(6, 20, 8, case))
    query.requires_grad_()
    wide = query.detach().float().requires_grad_()
    result = case(ops.relational_loss, query, key, queue)
    expected = case(ops.relational_loss, wide, key.float(), queue.float())
    result.loss.backward()
    expected.loss.backward()
    assert result.loss.dtype == torch.float32 and query.grad.dtype == dtype
    assert_near(result.loss, expected.loss, case.precision(torch.float32))
    assert_near(query.grad, wide.grad, case.precision(dtype))


@all_cases
def test_autocast_does_not_lower_the_precision(case):
    query, key, queue, _ = inputs(6, 20, 8, case)
    plain = case(ops.relational_loss, query, key, queue)
    with torch.autocast(case.device, dtype=torch.bfloat16):
        for a, b in zip(case(ops.relational_loss, query, key, queue), plain):
            assert torch.equal(a, b)


@all_cases
def test_non_contiguous_inputs(case):
    query, key, queue, _ = inputs(6, 20, 8, case)
    strided = [torch.stack([t, t], dim=2)[:, :, 0].T.contiguous().T for t in (query, key, queue)]
    assert not strided[0].is_contiguous()
    assert_near(
        case(ops.relational_loss, *strided).loss, case(ops.relational_loss, query, key, queue).loss, torch.float32
    )


def bad(**changes):
    arguments = {"query": unit_rows(4, 128, 0), "key": unit_rows(4, 128, 1), "queue": unit_rows(9, 128, 2)}
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"queue": torch.zeros(65536, 256)}, ValueError, "queue must be [K, 128] like query, got [65536, 256]"),
        ({"query": [1.0]}, TypeError, "query must be a tensor [M, D], got list"),
        ({"query": torch.zeros(4, 2, 64)}, ValueError, "query must be [M, D], got [4, 2, 64]"),
        (
            {"query": torch.zeros(4, 128, dtype=torch.int64)},
            TypeError,
            "query must be a floating-point tensor [M, D], got torch.int64",
        ),
        ({"key": torch.zeros(5, 128)}, ValueError, "key must be [4, 128] like query, got [5, 128]"),
        ({"queue": torch.zeros(0, 128)}, ValueError, "queue must have K >= 1 rows, got [0, 128]"),
        ({"query": torch.zeros(0, 128)}, ValueError, "query must have M >= 1 rows, got [0, 128]"),
        ({"query_permuted": torch.zeros(4, 64)}, ValueError, "query_permuted must be [4, 128] like query, got [4, 64]"),
        ({"queue": torch.zeros(9, 128, device="meta")}, ValueError, "queue must be on cpu like query, got meta"),
        ({"tau_kl": 0.0}, ValueError, "tau_kl must be above 0, got 0.0"),
        ({"tau_info": math.nan}, ValueError, "tau_info must be above 0, got nan"),
        ({"tau_info": "0.07"}, TypeError, "tau_info must be a number, got str"),
        ({"alpha": None}, TypeError, "alpha must be a number, got NoneType"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error) as caught:
        ops.relational_loss(**bad(**changes))
    assert str(caught.value) == f"relational_loss: {message}"


def test_debug_checks_values(monkeypatch):
    monkeypatch.setenv("RCMSTR_FAST_DEBUG", "1")
    ops.relational_loss(**bad())
    with pytest.raises(ValueError, match="relational_loss: key must have rows of length 1, got one that is off by 1"):
        ops.relational_loss(**bad(key=2 * unit_rows(4, 128, 1)))
    with pytest.raises(ValueError, match="relational_loss: queue must be finite"):
        ops.relational_loss(**bad(queue=torch.full((9, 128), math.inf)))
    with pytest.raises(ValueError, match=r"relational_loss: queue must have rows of length 1 .*, got one of length 2"):
        ops.relational_loss(**bad(queue=2 * unit_rows(9, 128, 2)))
    ops.relational_loss(**bad(queue=torch.zeros(9, 128)))
