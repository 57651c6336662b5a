"""All loss terms of a step in one call give what the single operations give, in one launch for each pass or many."""

import math

import pytest
import torch

from rcmstr_fast import ops
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.kernels.queue_losses import tiles
from rcmstr_fast.ops.queue_losses import operator
from rcmstr_fast.tuning import choices
from tests.kernels.rows import BACKENDS, DEVICE, TRITON, relative, unit_rows, worst_row

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow):RuntimeWarning")
WAYS = [("chunked", "auto"), *(pytest.param("triton", way, marks=TRITON) for way in ("scheduled", "separate"))]
TOLERANCE = {"reference": (1e-6, 1e-6, 1e-5), "chunked": (2e-6, 1e-5, 1e-4), "triton": (1e-4, 1e-3, 1e-2)}


def step_terms(images, frames, subwords, width, keys, *, two=True, between=True, dtype=torch.float32):
    """Terms of a step with leaves as queries: the three levels, then frame -> subword and subword -> word."""

    def rows(count, seed):
        return unit_rows(count, width, seed=seed, device=DEVICE).half().to(dtype)

    sizes = (images * frames, images * subwords, images)
    queues = [rows(n, 90 + i) for i, n in enumerate(keys)]
    terms = []
    for level, size in enumerate(sizes):
        query, permuted = (rows(size, 10 * level + i).requires_grad_() for i in range(2))
        permuted = permuted if two else None
        terms.append(ops.LossTerm(query, rows(size, 10 * level + 5), queues[level], permuted, 0.3 / (level + 1)))
    if between:
        low = torch.randint(0, sizes[0], (sizes[0] + 3,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
        high = torch.arange(len(low), device=DEVICE) % sizes[1]
        frame, subword, word = terms
        terms.append(ops.LossTerm(frame.query, subword.key, queues[1], kl_only=True, query_rows=low, key_rows=high))
        rows_of_word = torch.arange(sizes[1], device=DEVICE) // subwords
        terms.append(ops.LossTerm(subword.query, word.key, queues[2], kl_only=True, key_rows=rows_of_word))
    return terms


def leaves(terms):
    found = {id(q): q for t in terms for q in (t.query, t.query_permuted) if q is not None}
    return list(found.values())


def doubled(terms):
    """The same terms in float64, with leaves of their own."""
    twins = {id(q): q.detach().double().requires_grad_() for q in leaves(terms)}
    return [
        term._replace(
            query=twins[id(term.query)],
            query_permuted=None if term.query_permuted is None else twins[id(term.query_permuted)],
            key=term.key.double(),
            queue=term.queue.double(),
        )
        for term in terms
    ]


def gradients(terms, weights, **options):
    results = ops.relational_losses(terms, **options)
    total = sum(w * r.loss for w, r in zip(weights, results))
    return results, torch.autograd.grad(total, leaves(terms))


@pytest.mark.parametrize("backend, launch", [("reference", "auto"), *WAYS])
@pytest.mark.parametrize(
    "images, frames, subwords, width, keys, two, between",
    [
        (2, 26, 4, 64, (130, 70, 33), True, True),
        (1, 1, 1, 128, (1, 1, 1), True, True),
        (3, 7, 2, 64, (65, 200, 17), False, True),
        (2, 9, 3, 256, (40, 65, 31), True, False),
        (1, 5, 2, 512, (33, 40, 7), True, True),
        (2, 5, 2, 64, (33, 40, 7), True, False),
    ],
)
def test_against_float64_operations(backend, launch, images, frames, subwords, width, keys, two, between):
    terms = step_terms(images, frames, subwords, width, keys, two=two, between=between)
    weights = [1.0, 0.5, 2.0, 0.3, 0.7][: len(terms)]
    exact = doubled(terms)
    total = 0.0
    expected = []
    for weight, term in zip(weights, exact):
        if term.kl_only:
            rows = {"query_rows": term.query_rows, "key_rows": term.key_rows}
            kl = ops.relation_kl(term.query, term.key, term.queue, backend="reference", **rows)
            expected.append((kl, torch.zeros(()), kl))
        else:
            result = ops.relational_loss(
                term.query,
                term.key,
                term.queue,
                query_permuted=term.query_permuted,
                alpha=term.alpha,
                backend="reference",
            )
            expected.append(result)
        total = total + weight * expected[-1][0]
    wanted = torch.autograd.grad(total, leaves(exact))
    results, found = gradients(terms, weights, backend=backend, launch=launch)
    value, norm, row = TOLERANCE[backend]
    for result, reference in zip(results, expected):
        for got, want in zip(result, reference):
            assert abs(float(got.detach()) - float(want.detach())) <= value * abs(float(want.detach())) + 5e-6
        assert not result.info.requires_grad and not result.kl.requires_grad
    for got, want in zip(found, wanted):
        if float(want.norm()) < 1e-9:  # one queue row: nothing to tell apart
            assert float(got.norm()) < 1e-5
            continue
        assert relative(got, want) < norm
        assert worst_row(got, want) < row


@TRITON
def test_one_launch_a_pass_and_bitwise_repeats(monkeypatch):
    from rcmstr_fast.kernels.queue_losses import problem
    from rcmstr_fast.kernels.queue_losses import terms as loss_terms

    launches = []
    monkeypatch.setattr(problem.Problem, "launch", lambda self, kind, *_: launches.append((kind, "alone")))
    original = loss_terms.launch_all
    monkeypatch.setattr(
        loss_terms, "launch_all", lambda p, kind, *a: (launches.append((kind, len(p))), original(p, kind, *a))[1]
    )
    terms = step_terms(1, 26, 4, 64, (90, 40, 20))
    one, first = gradients(terms, [1.0] * 5, backend="triton", launch="scheduled")
    two, second = gradients(terms, [1.0] * 5, backend="triton", launch="scheduled")
    assert launches == [("stats", 5), ("gradient", 5)] * 2
    assert all(torch.equal(a, b) for x, y in zip(one, two) for a, b in zip(x, y))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@TRITON
def test_a_pass_whose_bodies_spill_in_one_kernel_is_launched_term_by_term(monkeypatch):
    """Family 80 at D = 128: sums in one launch, the gradient in five, and the same values and gradients."""
    from rcmstr_fast.kernels import runtime
    from rcmstr_fast.kernels.queue_losses import problem
    from rcmstr_fast.kernels.queue_losses import terms as loss_terms

    launches = []
    for where, name, who in ((problem.Problem, "launch", "alone"), (loss_terms, "launch_all", "all")):
        original = getattr(where, name)
        monkeypatch.setattr(
            where, name, lambda p, kind, *a, to=original, who=who: (launches.append((kind, who)), to(p, kind, *a))[1]
        )
    monkeypatch.setattr(runtime, "architecture", lambda device: 80)
    terms = step_terms(1, 9, 3, 128, (40, 20, 20))
    values, found = gradients(terms, [1.0] * 5, backend="triton", launch="scheduled")
    assert launches == [("stats", "all"), *[("gradient", "alone")] * 5]
    expected, wanted = gradients(terms, [1.0] * 5, backend="triton", launch="separate")
    for got, want in zip(values, expected):
        assert torch.allclose(torch.stack(list(got)), torch.stack(list(want)), rtol=1e-5)
    assert all(relative(got, want) < 1e-4 for got, want in zip(found, wanted))


@TRITON
def test_one_launch_is_the_prior_a_choice_replaces_it_and_pairs_alone_are_launched_separately(monkeypatch):
    from rcmstr_fast.kernels.queue_losses import terms as loss_terms

    called = []
    original = loss_terms.launch_all
    monkeypatch.setattr(loss_terms, "launch_all", lambda *a: called.append(1) or original(*a))
    terms = step_terms(1, 5, 2, 64, (20, 20, 20))
    with torch.no_grad():
        with choices.using({operator.LAUNCH.name: "separate"}):
            ops.relational_losses(terms, backend="triton")
        assert not called
        ops.relational_losses(terms, backend="triton")
        assert len(called) == 1  # no gradient: the stats pass alone
        ops.relational_losses(terms[3:], backend="triton", launch="scheduled")
        assert len(called) == 1


@TRITON
def test_another_tile_holds_while_it_is_chosen_and_gives_the_same(monkeypatch):
    from rcmstr_fast.ops.queue_losses import tile_choice
    from rcmstr_fast.ops.tile_choice import read, write
    from rcmstr_fast.tuning.choices import Setting

    config = PretrainConfig()
    config.model.feature_dim = 64
    setting = Setting(str(DEVICE), config=config, calls={"relational_losses": ("triton", "chunked")})
    found = tile_choice.GRADIENT.candidates(setting)
    assert len(found) > 2 and found[0] == tile_choice.GRADIENT.prior(setting)
    assert all(write(*read(value, tiles.Tile(16, 16, 4, 1, 1))) == value for value in found)
    terms, before = step_terms(1, 5, 2, 64, (20, 20, 20)), dict(tiles.GRADIENT)
    _, expected = gradients(terms, [1.0] * 5, backend="triton")
    with choices.using({tile_choice.GRADIENT.name: found[-1]}):
        assert before != tiles.GRADIENT
        _, other = gradients(terms, [1.0] * 5, backend="triton")
    assert before == tiles.GRADIENT
    for one, two in zip(expected, other):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend, launch", WAYS)
def test_nan_in_a_term_stays_in_that_term(backend, launch):
    terms = step_terms(1, 5, 2, 64, (20, 20, 20))
    queue = terms[1].queue.clone()
    queue[3, 2] = math.nan
    terms[1] = terms[1]._replace(queue=queue)
    results = ops.relational_losses(terms, backend=backend, launch=launch)
    assert [bool(torch.isnan(r.loss)) for r in results] == [False, True, False, False, False]


@pytest.mark.parametrize("backend, launch", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_the_dtype_of_the_queries(backend, launch, dtype):
    terms = step_terms(1, 3, 2, 64, (20, 20, 20), dtype=dtype)
    _, found = gradients(terms, [1.0] * 5, backend=backend, launch=launch)
    assert {g.dtype for g in found} == {dtype}


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    terms = step_terms(1, 3, 2, 64, (20, 20, 20))
    given = (*operator._flatten(terms), 0.07, 0.04, True, "scheduled", backend)
    torch.library.opcheck(operator._losses, given, test_utils=("test_schema", "test_faketensor"))

    def step(*queries):
        rows = iter(queries)
        made = [
            t._replace(query=next(rows), query_permuted=next(rows) if t.query_permuted is not None else None)
            for t in terms[:3]
        ]
        made += [terms[3]._replace(query=made[0].query), terms[4]._replace(query=made[1].query)]
        return sum(r.loss for r in ops.relational_losses(made, backend=backend, launch="scheduled"))

    inputs = leaves(terms)
    plain = torch.autograd.grad(step(*inputs), inputs)
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled))


def test_bad_terms_are_named():
    terms = step_terms(1, 3, 2, 64, (20, 20, 20))
    with pytest.raises(ValueError, match="at least one"):
        ops.relational_losses([])
    with pytest.raises(TypeError, match="term 1 must be a LossTerm, got tuple"):
        ops.relational_losses([terms[0], tuple(terms[1])])
    with pytest.raises(ValueError, match="term 1: query_rows"):
        ops.relational_losses([terms[0], terms[1]._replace(query_rows=torch.arange(3))])
    with pytest.raises(ValueError, match="term 0: query_permuted"):
        ops.relational_losses([terms[0]._replace(kl_only=True)])
    with pytest.raises(ValueError, match=r"term 0: queue must be \[K, 64\]"):
        ops.relational_losses([terms[0]._replace(queue=terms[0].queue[:, :32])])
    with pytest.raises(ValueError, match="launch"):
        ops.relational_losses(terms, launch="twice")
    with pytest.raises(ValueError, match="one D, got 32 and 64"):
        ops.relational_losses([terms[0], ops.LossTerm(*(unit_rows(4, 32, seed=i) for i in range(3)))])


def test_schedule_is_balanced_and_within_the_workspace():
    """All five terms at B = 512, D = 128 on an H200: the device is busy 95 % of the time."""
    rows = ((13312, 2, 5.0), (2048, 2, 5.0), (512, 2, 5.0), (16384, 1, 3.0), (2048, 1, 3.0))
    work = tuple(tiles.Work(-(-m // 128), 2048, cost, 4 * g * m * 128) for m, g, cost in rows)
    parts = tiles.schedule(work, 132)
    assert sum(w.bytes_a_part * n for w, n in zip(work, parts)) <= tiles.WORKSPACE_BYTES
    total = sum(w.programs * w.key_tiles * w.cost for w in work)
    assert total / (132 * tiles._makespan(work, list(parts), 132)) > 0.93
    assert tiles.schedule((tiles.Work(1, 1, 3.0, 4),), 132) == (1,)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: a step's terms at full size, no synchronisation")
@pytest.mark.parametrize("launch", ["scheduled", "separate"])
def test_a_step_at_full_size_never_synchronises(launch):
    terms = step_terms(512, 26, 4, 128, (65536,) * 3)
    gradients(terms, [1.0] * 5, launch=launch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results, found = gradients(terms, [1.0] * 5, launch=launch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    other, wanted = gradients(terms, [1.0] * 5, launch="separate")
    for one, two in zip(results, other):
        assert float(one.loss.detach()) == pytest.approx(float(two.loss.detach()), rel=1e-4)
    assert all(relative(a, b.double()) < 1e-3 for a, b in zip(found, wanted))
