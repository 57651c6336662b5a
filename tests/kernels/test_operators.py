"""The custom operators as PyTorch sees them: opcheck, torch.compile, autocast, and the memory they take."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rcmstr_fast import ops
from rcmstr_fast.ops.enqueue import triton as enqueue
from rcmstr_fast.ops.hierarchical_pool import triton as hierarchical_pool
from rcmstr_fast.ops.masked_mse import triton as masked_mse
from rcmstr_fast.ops.queue_losses import operator
from tests.kernels.rows import BACKENDS, DEVICE, TRITON, unit_rows

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["one query", "two queries", "pairs"])
def test_opcheck_of_one_term(backend, kind):
    query, permuted, key, queue = (unit_rows(n, 64, seed=i, device=DEVICE) for i, n in enumerate((4, 4, 4, 9)))
    term = ops.LossTerm(query.requires_grad_(), key, queue)
    if kind == "two queries":
        term = term._replace(query_permuted=permuted.requires_grad_())
    if kind == "pairs":
        term = term._replace(key=key[:3], kl_only=True, query_rows=torch.tensor([3, 0, 1], device=DEVICE))
    for with_gradient in (True, False):
        arguments = (*operator._flatten([term]), 0.07, 0.04, with_gradient, "separate", backend)
        torch.library.opcheck(operator._losses, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(operator._losses, arguments, test_utils="test_autograd_registration")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_gradient", [(True, False), (False, True)])
def test_only_the_query_that_requires_a_gradient_gets_one(backend, with_gradient):
    query, permuted, key, queue = (unit_rows(n, 64, seed=i, device=DEVICE) for i, n in enumerate((4, 4, 4, 9)))
    for rows, wanted in zip((query, permuted), with_gradient):
        rows.requires_grad_(wanted)
    ops.relational_loss(query, key, queue, query_permuted=permuted, backend=backend).loss.backward()
    assert [x.grad is not None and bool(x.grad.any()) for x in (query, permuted)] == list(with_gradient)


@TRITON
def test_opcheck_small_operators():
    frames = torch.randn(4, 6, 5, device=DEVICE, requires_grad=True)
    order = torch.tensor([[2, 0], [3, 1], [4, 6], [5, 7]], device=DEVICE)
    for choice in (order, None):
        torch.library.opcheck(hierarchical_pool._pool, (frames, 2, choice))
    image = torch.randn(2, 3, 4, 5, device=DEVICE)
    mask = torch.rand(2, 1, 4, 5, device=DEVICE) > 0.5
    torch.library.opcheck(masked_mse._mse, (image.clone().requires_grad_(), image, mask))
    queue, pointer = torch.randn(7, 5, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(enqueue._enqueue_, (queue, pointer, torch.randn(3, 5, device=DEVICE)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_without_a_graph_break(backend):
    key, queue = unit_rows(6, 64, seed=1, device=DEVICE), unit_rows(20, 64, seed=2, device=DEVICE)
    rows = torch.arange(6, device=DEVICE)

    def step(weight):
        query = torch.nn.functional.normalize(weight, dim=1)
        level = ops.relational_loss(query, key, queue, backend=backend).loss
        return level + ops.relation_kl(query, key, queue, query_rows=rows, key_rows=rows, backend=backend)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(5)).to(DEVICE).requires_grad_()
        loss = function(weight)
        loss.backward()
        results.append((loss.detach(), weight.grad))
    assert torch.allclose(results[0][0], results[1][0]) and torch.allclose(results[0][1], results[1][1])


def test_the_automatic_choice_compiles_without_a_graph_break():
    query, key, queue = (unit_rows(n, 64, seed=n, device=DEVICE) for n in (6, 6, 20))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(query):
        return ops.relational_loss(query, key, queue).loss

    assert torch.allclose(step(query), ops.relational_loss(query, key, queue).loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_the_arithmetic(backend):
    query, key, queue = (unit_rows(n, 64, seed=n, device=DEVICE) for n in (6, 6, 20))
    plain = ops.relational_loss(query, key, queue, backend=backend)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = ops.relational_loss(query, key, queue, backend=backend)
    assert inside.loss.dtype == torch.float32 and torch.equal(plain.loss, inside.loss)


def test_training_on_the_cpu_takes_the_chunked_loss(monkeypatch):
    from rcmstr_fast.ops.queue_losses import chunked

    called = []
    original = chunked.level
    monkeypatch.setattr(chunked, "level", lambda *a: called.append(1) or original(*a))
    query, key, queue = (unit_rows(n, 12, seed=n) for n in (6, 6, 20))
    ops.relational_loss(query.requires_grad_(), key, queue).loss.backward()
    assert called


class Allocated(TorchDispatchMode):
    """Counts the bytes of every storage that an operator makes."""

    def __init__(self, *given):
        super().__init__()
        self.storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in given}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in self.storages:
            self.storages[result.untyped_storage()._cdata] = result.untyped_storage()
            self.bytes += result.untyped_storage().nbytes()
        return result


class _NoKernel:
    def __getitem__(self, grid):
        return lambda *a, **k: None


@TRITON
def test_the_kernels_allocate_a_few_times_m_x_d(monkeypatch):
    """M = 13,312, K = 65,536, D = 128 with both queries: everything ever allocated is below 200 MiB."""
    from rcmstr_fast.kernels import runtime
    from rcmstr_fast.kernels.queue_losses import row_terms, similarity, terms

    for name in ("_stats_kernel", "_gradient_kernel"):
        monkeypatch.setattr(similarity, name, _NoKernel())
    for name in ("_row_terms_kernel", "_reduce_kernel"):
        monkeypatch.setattr(row_terms, name, _NoKernel())
    for multiprocessors in (108, 132):
        monkeypatch.setattr(runtime, "multiprocessors", lambda device, n=multiprocessors: n)
        query, key, queue = (torch.empty(n, 128, device="meta") for n in (13312, 13312, 65536))
        with Allocated(query, key, queue) as allocated:
            terms.relational_losses([ops.LossTerm(query, key, queue, query)], 0.07, 0.04, True, "separate")
        assert 2 * 13312 * 128 * 4 < allocated.bytes < 200 << 20


@pytest.mark.slow
def test_the_full_queue_fits_the_cpu():
    """M = 1,664, K = 65,536: the reference needs 0.4 GiB a similarity; here the process grows by less than 0.5 GiB."""
    code = """
import resource, torch
from rcmstr_fast import ops
unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape), dim=1)
query, key, queue = unit(1664, 128).requires_grad_(), unit(1664, 128), unit(65536, 128)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.relational_loss(query, key, queue).loss.backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, float(query.grad.norm()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    grown, norm = map(float, done.stdout.split())
    assert grown < 0.5 and norm > 0
