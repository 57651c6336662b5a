"""The queue losses on every backend against float64, at sizes and inputs where they could break."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from rcmstr_fast import ops
from rcmstr_fast.kernels import runtime
from rcmstr_fast.kernels.architectures import FAMILIES
from rcmstr_fast.ops.dispatch import BackendError
from tests.kernels.rows import BACKENDS, DEVICE, TRITON, queue_rows, relative, unit_rows, worst_row

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
EPS = {"chunked": 2e-6, "triton": 1e-4}  # relative error of the loss
GRAD = {"chunked": 1e-5, "triton": 1e-3}  # relative error of the gradient
ROW = {"chunked": 1e-4, "triton": 1e-2}


def run(query, key, queue, permuted=None, *, dtype=None, backend="reference", **options):
    """Results and the gradients of the queries."""
    cast = (lambda x: x) if dtype is None else (lambda x: x.to(dtype))
    query = cast(query).detach().clone().requires_grad_()
    permuted = None if permuted is None else cast(permuted).detach().clone().requires_grad_()
    result = ops.relational_loss(query, cast(key), cast(queue), query_permuted=permuted, backend=backend, **options)
    result.loss.backward()
    return result, query.grad, None if permuted is None else permuted.grad


def compare(backend, query, key, queue, permuted=None, **options):
    expected, *gradients = run(query, key, queue, permuted, dtype=torch.float64, **options)
    result, *found = run(query, key, queue, permuted, backend=backend, **options)
    for name in ("loss", "info", "kl"):
        error = abs(float(getattr(result, name).detach()) - float(getattr(expected, name).detach()))
        assert error <= EPS[backend] * abs(float(getattr(expected, name).detach())) + 5e-6, (name, error)
    for gradient, reference in zip(found, gradients):
        if reference is not None:
            assert gradient.dtype == query.dtype
            assert relative(gradient, reference) < GRAD[backend]
            assert worst_row(gradient, reference) < ROW[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["random", "clustered", "own", "duplicated"])
@pytest.mark.parametrize("tau_info, tau_kl", [(0.07, 0.04), (0.02, 0.02), (1.0, 1.0), (0.05, 0.033)])
def test_against_float64(backend, kind, tau_info, tau_kl):
    """Inputs that fp16 holds exactly, so that only the kernel's own error counts."""
    query, key, permuted = (unit_rows(70, 64, seed=i, device=DEVICE).half().float() for i in range(3))
    key = torch.nn.functional.normalize(key + query, dim=1).half().float()
    queue = queue_rows(kind, query, 201).half().float()
    compare(backend, query, key, queue, permuted, tau_info=tau_info, tau_kl=tau_kl, alpha=0.3)


@TRITON
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keys, alpha", [(192, 0.3), (201, 0.3), (128, -0.2), (201, 0.0)])
def test_the_tiles_of_every_family(monkeypatch, family, keys, alpha):
    """Whole steps or not, a coefficient in the exponent or not, and each sign of it."""
    monkeypatch.setattr(runtime, "architecture", lambda device: family)
    query, key, permuted = (unit_rows(70, 128, seed=i, device=DEVICE).half().float() for i in range(3))
    queue = queue_rows("clustered", query, keys).half().float()
    compare("triton", query, key, queue, permuted, alpha=alpha)


@TRITON
@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_float32_rows_are_rounded_to_fp16_within_the_tolerance(kind):
    query, key, permuted = (unit_rows(70, 128, seed=i, device=DEVICE) for i in range(3))
    compare("triton", query, key, queue_rows(kind, query, 300), permuted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "rows, keys, width, two", [(1, 1, 64, True), (65, 63, 128, False), (3, 257, 256, True), (2, 70, 512, True)]
)
def test_sizes(backend, rows, keys, width, two):
    query, key, permuted = (unit_rows(rows, width, seed=i, device=DEVICE).half().float() for i in range(3))
    queue = unit_rows(keys, width, seed=9, device=DEVICE).half().float()
    compare(backend, query, key, queue, permuted if two else None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs(backend, dtype):
    query, key, permuted = (unit_rows(40, 64, seed=i, device=DEVICE).to(dtype) for i in range(3))
    queue = unit_rows(90, 64, seed=9, device=DEVICE).to(dtype)
    expected, *gradients = run(query, key, queue, permuted, dtype=torch.float64)
    result, *found = run(query, key, queue, permuted, backend=backend)
    assert abs(float(result.loss.detach() - expected.loss.detach())) < 1e-4 * float(expected.loss.detach())
    for gradient, reference in zip(found, gradients):
        assert gradient.dtype == dtype
        assert relative(gradient, reference) < torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_near_key_has_small_gradients_and_non_contiguous_rows_are_fine(backend):
    query, noise, queue = (unit_rows(n, 64, seed=i, device=DEVICE) for i, n in enumerate((20, 20, 333)))
    key = torch.nn.functional.normalize(query + 0.2 * noise, dim=1)
    query, key, queue = (x.half().float().T.contiguous().T for x in (query, key, queue))
    assert not query.is_contiguous()
    compare(backend, query, key, queue)


@TRITON
@pytest.mark.parametrize("tau", [0.04, 0.07])
def test_where_query_key_and_queue_nearly_coincide_the_error_lies_along_the_query(tau):
    """Backward of the L2 norm removes that direction; docs/ops/relational_loss.md says where the error comes from."""
    query = unit_rows(40, 64, seed=1, device=DEVICE)
    key = torch.nn.functional.normalize(query + 0.1 * unit_rows(40, 64, seed=2, device=DEVICE), dim=1)
    queue = queue_rows("own", query, 64).half().float()
    query, key = query.half().float(), key.half().float()
    _, expected, _ = run(query, key, queue, dtype=torch.float64, tau_info=tau, tau_kl=tau)
    _, found, _ = run(query, key, queue, backend="triton", tau_info=tau, tau_kl=tau)
    unit = torch.nn.functional.normalize(query.double(), dim=1)
    across = [g.double() - (g.double() * unit).sum(1, keepdim=True) * unit for g in (found, expected)]
    assert relative(*across) < 1e-3
    assert relative(found, expected) < 4e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_kl_it_is_cross_entropy(backend):
    query, key, queue = (unit_rows(n, 64, seed=n, device=DEVICE).half().float() for n in (33, 33, 100))
    key = key[torch.randperm(33, generator=torch.Generator().manual_seed(1))]
    result = ops.relational_loss(query, key, queue, alpha=0.0, backend=backend)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1).double() / 0.07
    expected = cross_entropy(logits, torch.zeros(33, dtype=torch.int64, device=DEVICE))
    assert float(result.loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(result.loss) == float(result.info)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tau", [0.02, 0.07])
def test_a_queue_of_zeros_has_a_closed_form(backend, tau):
    query, key = (unit_rows(5, 64, seed=i, device=DEVICE).half().float() for i in range(2))
    result = ops.relational_loss(
        query, key, torch.zeros(77, 64, device=DEVICE), tau_info=tau, tau_kl=tau, backend=backend
    )
    own = (query * key).sum(1).double() / tau
    expected = (torch.logaddexp(torch.tensor(77.0).double().log().to(own), own) - own).mean()
    assert float(result.info) == pytest.approx(float(expected), rel=1e-5)
    assert float(result.kl) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_of_equal_rows_is_zero_with_zero_gradient(backend):
    rows = unit_rows(20, 64, seed=3, device=DEVICE).half().float()
    query = rows.clone().requires_grad_()
    kl = ops.relation_kl(query, rows, unit_rows(70, 64, seed=5, device=DEVICE), backend=backend)
    kl.backward()
    assert abs(float(kl.detach())) < 1e-6
    assert float(query.grad.norm()) < 1e-5


@TRITON
@pytest.mark.parametrize("tau", [0.02, 0.04])
def test_a_kl_that_rounding_has_left_below_zero_keeps_the_gradient_finite(tau):
    """Equal queue rows give P = Q: the KL is the difference of two equal means, here one bit or so apart."""
    from rcmstr_fast.kernels.queue_losses import problem

    query, key, queue = (unit_rows(n, 64, seed=n, device=DEVICE) for n in (20, 20, 90))
    made = problem.level_problem([query], key, queue, tau, tau, 0.3)
    partials = torch.ones(1, 1, 5, 20, device=DEVICE)  # Z_info, Z_q, D_q, Z_p, D_p
    partials[:, :, 2] = 1 + torch.arange(20, device=DEVICE) * 2.0**-23
    _, kls, coefficients = made.row_terms(partials)
    assert float(kls.min()) < -1e-5 and bool(coefficients.isfinite().all())
    partials[0, 0, 4, 3] = math.nan
    assert made.row_terms(partials)[2].isnan().any(dim=1)[0].nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_the_queue_does_not_matter_and_repeats_are_bitwise(backend):
    query, key = (unit_rows(30, 64, seed=i, device=DEVICE) for i in range(2))
    queue = unit_rows(300, 64, seed=9, device=DEVICE)
    one, gradient, _ = run(query, key, queue, backend=backend)
    two, again, _ = run(query, key, queue, backend=backend)
    assert torch.equal(one.loss, two.loss) and torch.equal(gradient, again)
    turned, other, _ = run(query, key, queue.flip(0), backend=backend)
    assert float(turned.loss.detach()) == pytest.approx(float(one.loss.detach()), rel=1e-5)
    assert relative(other, gradient.double()) < GRAD[backend]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_queue_may_be_overwritten_before_backward(backend):
    query, key = (unit_rows(9, 64, seed=i, device=DEVICE) for i in range(2))
    queue = unit_rows(50, 64, seed=9, device=DEVICE)
    _, expected, _ = run(query, key, queue, backend=backend)
    query = query.clone().requires_grad_()
    loss = ops.relational_loss(query, key, queue, backend=backend).loss
    queue.fill_(math.nan)
    (3 * loss).backward()
    assert torch.allclose(query.grad, 3 * expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["query", "key", "queue", "query_permuted"])
def test_nan_in_gives_nan_out(backend, where):
    tensors = {n: unit_rows(9, 64, seed=i, device=DEVICE) for i, n in enumerate(("query", "key", "query_permuted"))}
    tensors["queue"] = unit_rows(70, 64, seed=9, device=DEVICE)
    tensors[where][3, 5] = math.nan
    query = tensors.pop("query").requires_grad_()
    result = ops.relational_loss(query, backend=backend, **tensors)
    result.loss.backward()
    assert torch.isnan(result.loss) and torch.isnan(result.info if where != "key" else result.kl)
    assert bool(torch.isnan(query.grad).any()) == (where != "query_permuted")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", range(3), ids=["query", "key", "queue"])
def test_nan_in_gives_nan_out_of_relation_kl(backend, where):
    tensors = [unit_rows(9, 64, seed=i, device=DEVICE) for i in range(3)]
    tensors[where][3, 5] = math.nan
    kl = ops.relation_kl(tensors[0].requires_grad_(), *tensors[1:], backend=backend)
    kl.backward()
    assert torch.isnan(kl) and torch.isnan(tensors[0].grad).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_index_maps_with_repeated_and_unused_rows(backend):
    query, key, queue = (unit_rows(n, 64, seed=n, device=DEVICE).half().float() for n in (26, 4, 90))
    query_rows = torch.tensor([7, 1, 25, 1, 3, 1, 0, 25], device=DEVICE)
    key_rows = torch.tensor([0, 3, 1, 1, 2, 0, 3, 3], device=DEVICE)
    options = dict(query_rows=query_rows, key_rows=key_rows)
    exact = query.double().requires_grad_()
    expected = ops.relation_kl(exact, key.double(), queue.double(), backend="reference", **options)
    expected.backward()
    found = query.clone().requires_grad_()
    result = ops.relation_kl(found, key, queue, backend=backend, **options)
    result.backward()
    assert float(result.detach()) == pytest.approx(float(expected.detach()), rel=EPS[backend])
    assert relative(found.grad, exact.grad) < GRAD[backend]
    assert not found.grad[2].any()


@TRITON
def test_an_index_outside_its_table_gives_nan_on_the_device():
    query, key, queue = (unit_rows(n, 64, seed=n, device=DEVICE) for n in (6, 6, 20))
    rows = torch.tensor([0, 6], device=DEVICE)
    assert torch.isnan(ops.relation_kl(query, key, queue, query_rows=rows, key_rows=rows - 1, backend="triton"))


@TRITON
def test_without_gradient_there_is_one_pass(monkeypatch):
    from rcmstr_fast.kernels.queue_losses import problem as launcher

    kinds = []
    launch = launcher.Problem.launch
    monkeypatch.setattr(
        launcher.Problem, "launch", lambda self, kind, *a: (kinds.append(kind), launch(self, kind, *a))[1]
    )
    query, key, queue = (unit_rows(n, 64, seed=n, device=DEVICE) for n in (6, 6, 20))
    ops.relational_loss(query, key, queue, backend="triton")
    with torch.no_grad():
        ops.relation_kl(query.requires_grad_(), key, queue, backend="triton")
    assert kinds == ["stats", "stats"]


@TRITON
@pytest.mark.parametrize(
    "width, options, word",
    [
        (48, {}, "D must be"),
        (64, {"tau_kl": 0.01}, "tau_kl must be at least"),
        (64, {"dtype": torch.float64}, "float64"),
    ],
)
def test_refusals_name_the_reason(width, options, word):
    dtype = options.pop("dtype", torch.float32)
    query, key, queue = (unit_rows(n, width, seed=n, device=DEVICE).to(dtype) for n in (6, 6, 20))
    with pytest.raises(BackendError, match=word):
        ops.relational_loss(query, key, queue, backend="triton", **options)
    assert torch.isfinite(ops.relational_loss(query, key, queue, **options).loss)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs tensors on two devices: no CUDA GPU here")
@pytest.mark.gpu
def test_cpu_tensors_are_refused_by_the_gpu_backend():
    rows = unit_rows(6, 64)
    with pytest.raises(BackendError, match="query must be on cuda, got cpu"):
        ops.relational_loss(rows, rows, rows, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_ends_of_the_range_at_the_lowest_temperature(backend, sign):
    """Every queue row is the query or its opposite: exponents of +-1 / tau."""
    query, key = (unit_rows(4, 64, seed=i, device=DEVICE).half().float() for i in range(2))
    queue = (sign * query[:1]).expand(90, -1)
    compare(backend, query, key, queue, tau_info=0.015, tau_kl=0.015)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: a graph is captured")
def test_cuda_graph_capture_follows_new_inputs():
    query, key, queue = (unit_rows(n, 128, seed=n, device=DEVICE) for n in (300, 300, 5000))
    query.requires_grad_()

    def step():
        query.grad = None
        ops.relational_loss(query, key, queue, backend="triton").loss.backward()
        return query.grad

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    queue.copy_(unit_rows(5000, 128, seed=3, device=DEVICE))
    graph.replay()
    assert torch.equal(captured.clone(), step())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: peak memory of its allocator, no synchronisation")
def test_peak_memory_and_no_synchronisation_at_full_size():
    query, permuted, key, queue = (
        unit_rows(n, 128, seed=i, device=DEVICE) for i, n in enumerate((13312, 13312, 13312, 65536))
    )
    for rows in (query, permuted):
        rows.requires_grad_()
    ops.relational_loss(query, key, queue, query_permuted=permuted).loss.backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.relational_loss(query, key, queue, query_permuted=permuted).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 200 << 20


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: 2^31 similarities")
def test_more_than_two_to_the_31_similarities():
    query, key, queue = (
        unit_rows(n, 64, seed=i, device=DEVICE).half().float() for i, n in enumerate((33000, 33000, 65536))
    )
    one, gradient, _ = run(query, key, queue, backend="triton")
    two, expected, _ = run(query, key, queue, backend="chunked")
    assert float(one.loss.detach()) == pytest.approx(float(two.loss.detach()), rel=1e-4)
    assert relative(gradient, expected.double()) < GRAD["triton"]
    assert worst_row(gradient, expected.double()) < ROW["triton"]
