"""relation_kl: values, the streaming identity, pairs of rows."""

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


def inputs(m, n, k, d, case, dtype):
    kwargs, d = {"dtype": dtype, "device": case.device}, case.width(d)
    return unit_rows(m, d, 1, **kwargs), unit_rows(n, d, 2, **kwargs), unit_rows(k, d, 3, **kwargs)


@all_cases
@dtypes
@settings(max_examples=15, deadline=None)
@given(data=st.data(), m=st.integers(1, 7), n=st.integers(1, 7), k=st.integers(1, 30))
def test_pairs_match_the_oracle(case, dtype, data, m, n, k):
    query, key, queue = inputs(m, n, k, 6, case, dtype)
    pairs = data.draw(st.lists(st.tuples(st.integers(0, m - 1), st.integers(0, n - 1)), min_size=1, max_size=9))
    query_rows, key_rows = torch.tensor(pairs, device=case.device).unbind(1)
    got = case(ops.relation_kl, query, key, queue, tau=0.1, query_rows=query_rows, key_rows=key_rows)
    i, j = array(query_rows), array(key_rows)
    assert_near(got, relations.symmetric_kl(array(query)[i], array(key)[j], array(queue), 0.1), case.precision(dtype))
    assert got.dtype == dtype and got.dim() == 0


@all_cases
@dtypes
def test_gradient_of_repeated_rows(case, dtype):
    """Frames that belong to two subwords get the sum of both gradients."""
    query, key, queue = inputs(5, 2, 40, 8, case, dtype)
    pairs = [(0, 0), (1, 0), (2, 0), (2, 1), (3, 1), (4, 1)]
    query_rows, key_rows = torch.tensor(pairs, device=case.device).unbind(1)
    loss = case(ops.relation_kl, query.requires_grad_(), key, queue, query_rows=query_rows, key_rows=key_rows)
    (3 * loss).backward()
    expected = np.zeros(query.shape)
    for i, j in pairs:
        expected[i] += 3 / 6 * relations.streaming_kl(array(query)[i], array(key)[j], array(queue), 0.04, 16)[1]
    assert_near(query.grad, expected, case.precision(dtype))


@all_cases
def test_gradcheck(case):
    query, key, queue = inputs(3, 2, 6, 4, case, torch.float64)
    rows = torch.tensor([0, 0, 1, 2], device=case.device), torch.tensor([0, 1, 1, 0], device=case.device)

    def kl(q):
        return case(ops.relation_kl, q, key, queue, tau=0.2, query_rows=rows[0], key_rows=rows[1])

    assert torch.autograd.gradcheck(kl, (query.requires_grad_(),))


@all_cases
@dtypes
def test_not_negative_zero_at_equality_and_symmetric(case, dtype):
    query, key, queue = inputs(9, 9, 64, 16, case, dtype)
    forward, backward = case(ops.relation_kl, query, key, queue), case(ops.relation_kl, key, query, queue)
    assert forward > 0.1
    assert_near(forward, backward, case.precision(dtype), "symmetry")
    assert_near(case(ops.relation_kl, query, query.clone(), queue), 0.0, case.precision(dtype), "equality")


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_streaming_identity(block):
    """The identity the kernels use equals the two-KL definition and its autograd gradient, however it is split."""
    query, key, queue = (unit_rows(n, 16, n, dtype=torch.float64) for n in (4, 5, 300))
    for q, p in zip(query, key):
        row = q[None].clone().requires_grad_()
        loss = ops.relation_kl(row, p[None], queue, tau=0.04, backend="reference")
        loss.backward()
        value, gradient = relations.streaming_kl(q.numpy(), p.numpy(), queue.numpy(), 0.04, block)
        assert value == pytest.approx(loss.item(), rel=1e-12, abs=1e-12)
        assert np.abs(gradient - row.grad[0].numpy()).max() <= 1e-12 * max(1, np.abs(gradient).max())


def test_released_code_divides_by_the_queue_too():
    """The released code averages over rows and queue at once: the paper's value / K."""
    query, key, queue = (unit_rows(n, 16, n, dtype=torch.float64) for n in (6, 6, 50))
    log_q, log_p = (F.log_softmax(rows @ queue.T / 0.04, dim=1) for rows in (query, key))
    elements = [F.kl_div(x, y.exp(), reduction="none") for x, y in ((log_q, log_p), (log_p, log_q))]
    released = (elements[0].mean() + elements[1].mean()) / 2
    assert_near(released * 50, ops.relation_kl(query, key, queue), torch.float64)


@all_cases
def test_gradient_goes_to_the_query_only_and_survives_enqueue(case):
    tensors = inputs(4, 4, 20, 8, case, torch.float32)
    gradients = []
    for overwrite in (False, True):
        query, key, queue = (t.clone() for t in tensors)
        key.requires_grad_()
        loss = case(ops.relation_kl, query.requires_grad_(), key, queue)
        if overwrite:
            queue.fill_(float("nan"))
        loss.backward()
        assert key.grad is None
        gradients.append(query.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key": torch.zeros(3, 9)}, ValueError, "key must be [N, 8] like query, got [3, 9]"),
        ({"queue": torch.zeros(0, 8)}, ValueError, "queue must have K >= 1 rows, got [0, 8]"),
        ({"query_rows": torch.zeros(3)}, TypeError, "query_rows must be an int64 tensor [R], got torch.float32"),
        (
            {"query_rows": torch.tensor([0, 1])},
            ValueError,
            "query rows and key rows must pair up, at least one, got 2 and 3",
        ),
        (
            {"query_rows": torch.tensor([0]), "key_rows": torch.tensor([], dtype=torch.int64)},
            ValueError,
            "query rows and key rows must pair up, at least one, got 1 and 0",
        ),
        (
            {"key_rows": torch.zeros(4, dtype=torch.int64, device="meta")},
            ValueError,
            "key_rows must be on cpu like query, got meta",
        ),
        ({"tau": -1.0, "key": unit_rows(4, 8, 1)}, ValueError, "tau must be above 0, got -1.0"),
    ],
)
def test_bad_arguments(changes, error, message):
    arguments = {"query": unit_rows(4, 8, 0), "key": unit_rows(3, 8, 1), "queue": unit_rows(9, 8, 2)}
    with pytest.raises(error) as caught:
        ops.relation_kl(**(arguments | changes))
    assert str(caught.value) == f"relation_kl: {message}"


def test_debug_checks_the_index_maps(monkeypatch):
    monkeypatch.setenv("RCMSTR_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match=r"relation_kl: key_rows must be in 0\.\.2, got 0\.\.3"):
        ops.relation_kl(*(unit_rows(3, 8, n) for n in range(3)), key_rows=torch.tensor([0, 3, 1]))
