"""The self-check passes every backend of this machine and sees every planted fault."""

import pytest
import torch

from rcmstr_fast import ops
from rcmstr_fast.kernels.architectures import FAMILIES
from rcmstr_fast.kernels.queue_losses import tiles
from rcmstr_fast.ops import dispatch, selfcheck
from rcmstr_fast.ops.check_cases import CASES
from rcmstr_fast.tuning import record
from tests.tuning.faults import FAULTS, planted

CPU = torch.device("cpu")
USABLE = [
    (name, backend)
    for name, backends in dispatch.availability().items()
    for backend, reasons in backends.items()
    if backend in ("cpp", "chunked", "cuda") and not reasons
]


@pytest.fixture(autouse=True)
def own_record(tmp_path, monkeypatch):
    monkeypatch.setenv("RCMSTR_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("RCMSTR_FAST_BACKEND", raising=False)


def test_every_operation_has_cases():
    assert set(CASES) == set(dispatch.operations())


@pytest.mark.parametrize(("name", "backend"), USABLE)
def test_the_backends_of_this_machine_agree(name, backend):
    verdict = selfcheck.check(name, backend, selfcheck.device_of(backend))
    assert verdict.reasons == [] and verdict.cases > 0 and verdict.error < 0.02


def test_cases_of_a_gpu_run_nowhere_else(monkeypatch):
    cases, seen = CASES["relational_losses"](), []
    assert [case.device for case in cases].count("cuda") == 1
    monkeypatch.setattr(selfcheck, "compare", lambda case, *rest: seen.append(case.name))
    selfcheck._run_cases("relational_losses", "chunked", CPU, selfcheck.Verdict())
    assert seen == [case.name for case in cases if not case.device]


@pytest.mark.parametrize("multiprocessors", [20, 46, 72, 108, 132, 148, 170])
def test_on_a_gpu_every_program_of_the_losses_goes_through_several_steps(multiprocessors):
    (deep,) = [case for case in CASES["relational_losses"]() if case.device == "cuda"]
    drawn = deep.make()
    keys, width = drawn["queue"].shape
    for kind, table in (("stats", tiles.STATS), ("gradient", tiles.GRADIENT)):
        for family in FAMILIES:
            tile = tiles.tile(kind, family, width, 2)
            steps, programs = -(-keys // tile.block_n), -(-len(drawn["query"]) // tile.block_m)
            parts = tiles.split(programs, steps, multiprocessors * tile.resident, 1)
            assert steps / parts >= max(one.num_stages for one in table.values())


@pytest.mark.parametrize("operation", ["info_nce", "relational_losses"])
def test_plain_pytorch_checks_in_one_thread(operation):
    """From 2^15 elements on torch shares elementwise work among threads, which wait for each other on a busy CPU."""
    for case in CASES[operation]():
        drawn = case.make()
        rows = max(len(x) for name, x in drawn.items() if name in ("query", "query_rows"))
        others = len(drawn["queue"] if "queue" in drawn else drawn["candidates"])
        assert case.device == "cuda" or rows * others < 1 << 15


@pytest.mark.parametrize("name", ["masked_mse", "enqueue_", "replace_tokens", "hierarchical_pool"])
def test_kernels_in_the_interpreter_agree(name):
    if dispatch.availability()[name]["triton"]:
        pytest.skip("triton cannot run here")
    assert selfcheck.check(name, "triton", selfcheck.device_of("triton")).reasons == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_refused_with_a_reason(monkeypatch, caplog, fault):
    planted(monkeypatch, fault)
    x = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    out = [ops.grouped_batch_norm(x, torch.ones(3), torch.zeros(3)).out for _ in range(2)]
    exact = ops.grouped_batch_norm(x, torch.ones(3), torch.zeros(3), backend="reference").out
    assert all(torch.equal(found, exact) for found in out)
    assert len(caplog.records) == 1 and "grouped_batch_norm: backend cpp is refused: " in caplog.text
    assert FAULTS[fault][1] in caplog.text


def test_a_verdict_is_kept_and_an_order_is_not_asked(monkeypatch):
    asked = planted(monkeypatch, "nan")
    x = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    ops.grouped_batch_norm(x, torch.ones(3), torch.zeros(3))
    before = len(asked)
    operation = dispatch.operations()["grouped_batch_norm"]
    monkeypatch.setattr(operation, "refused", {})  # another process
    ops.grouped_batch_norm(x, torch.ones(3), torch.zeros(3))
    assert len(asked) == before and operation.refused["cpp"]
    assert record.read(CPU)["checks"]["grouped_batch_norm/cpp"]["reasons"] == operation.refused["cpp"]
    ordered = ops.grouped_batch_norm(x, torch.ones(3), torch.zeros(3), backend="cpp").out
    assert len(asked) == before + 1 and ordered.isnan().all()


def test_an_order_that_raises_fails_loudly(monkeypatch):
    planted(monkeypatch, "compile")
    with pytest.raises(RuntimeError, match="ptxas"):
        ops.grouped_batch_norm(torch.randn(4, 3), torch.ones(3), torch.zeros(3), backend="cpp")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_first_use_may_be_in_any_mode_and_draws_nothing(monkeypatch, mode):
    monkeypatch.setattr(dispatch.operations()["grouped_batch_norm"], "refused", {})
    x = torch.randn(4, 3)
    before = torch.get_rng_state()
    with mode():
        ops.grouped_batch_norm(x, torch.ones(3), torch.zeros(3))
    assert dispatch.operations()["grouped_batch_norm"].refused == {"cpp": []}
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_is_checked_while_a_graph_is_made(monkeypatch):
    operation = dispatch.operations()["grouped_batch_norm"]
    monkeypatch.setattr(operation, "refused", {})
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert operation.refusal("cpp") == [] and operation.refused == {}
    monkeypatch.undo()
    monkeypatch.setattr(operation, "refused", {})
    monkeypatch.setattr(dispatch, "_capturing", lambda: True)
    assert operation.refusal("triton") == [] and operation.refused == {}
