"""Choice of a backend: order, orders of the user's, reasons."""

import logging

import pytest

from rcmstr_fast import ops
from rcmstr_fast.ops import dispatch


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Operations declared by a test are forgotten, and the environment orders nothing."""
    monkeypatch.setattr(dispatch, "_OPERATIONS", {})
    monkeypatch.delenv("RCMSTR_FAST_BACKEND", raising=False)


def declare(**reasons):
    """An operation whose backends answer with their name; `reasons` refuse a call that passes small=True."""
    op = dispatch.operation("demo", lambda x, small=False: ("reference", x))

    def add(name, refuse):
        dispatch.register(
            op,
            name,
            lambda x, small=False: (name, x),
            unsupported_reasons=lambda x, small=False: refuse if small else [],
        )

    for name, refuse in reasons.items():
        add(name, refuse)
    return op


def test_automatic_choice_follows_the_order():
    assert declare()(1) == ("reference", 1)
    assert declare(triton=[], cpp=[])(1) == ("cpp", 1)
    assert declare(triton=[], cuda=[], cpp=[])(1) == ("cuda", 1)
    assert declare(triton=[], chunked=[])(1) == ("triton", 1)
    assert declare(chunked=[])(1) == ("chunked", 1)


def test_automatic_choice_falls_back_and_says_so_once(caplog):
    op = declare(triton=["rows are too few"])
    with caplog.at_level(logging.DEBUG, logger=dispatch.__name__):
        assert [op(n, small=True) for n in (1, 2)] == [("reference", 1), ("reference", 2)]
    assert [r.getMessage() for r in caplog.records] == [
        "demo runs on reference: backend triton cannot: rows are too few"
    ]


def test_the_automatic_choice_passes_over_what_a_backend_avoids_and_an_order_does_not():
    op = declare()
    dispatch.register(op, "triton", lambda x: ("triton", x), avoid=lambda x: ["slow below 10"] if x < 10 else [])
    assert op(1) == ("reference", 1) and op(10) == ("triton", 10)
    assert op(1, backend="triton") == ("triton", 1)


def test_an_order_is_followed_or_fails_with_every_reason():
    op = declare(triton=["rows are too few", "no GPU"])
    assert op(1, backend="reference") == ("reference", 1)
    assert op(1, backend="triton") == ("triton", 1)
    with pytest.raises(dispatch.BackendError) as caught:
        op(1, small=True, backend="triton")
    assert str(caught.value) == "demo: backend triton cannot: rows are too few, no GPU"


def test_orders_that_do_not_exist():
    op = declare(triton=[])
    with pytest.raises(dispatch.BackendError) as caught:
        op(1, backend="tpu")
    assert str(caught.value) == f"demo: backend must be one of {', '.join(dispatch.ORDER)}, got 'tpu'"
    with pytest.raises(dispatch.BackendError) as caught:
        op(1, backend="cpp")
    assert str(caught.value) == "demo: backend 'cpp' does not exist for it, only reference, triton"


def test_the_environment_variable_orders_all_operations(monkeypatch):
    op = declare(triton=["too small"], cuda=[])
    monkeypatch.setenv("RCMSTR_FAST_BACKEND", "triton")
    assert op(1) == ("triton", 1)
    assert op(1, backend="cuda") == ("cuda", 1), "the argument is the nearer order"
    with pytest.raises(dispatch.BackendError, match="demo: backend triton cannot: too small"):
        op(1, small=True)
    assert declare()(1) == ("reference", 1), "an operation without that backend has only its reference"
    monkeypatch.setenv("RCMSTR_FAST_BACKEND", "gpu")
    with pytest.raises(dispatch.BackendError, match="backend must be one of"):
        op(1)


def test_availability_is_asked_once_and_listed():
    asked = []

    def available():
        asked.append(1)
        return ["nvcc was missing at build time"]

    op = declare()
    dispatch.register(op, "cuda", lambda x: x, available=available)
    assert [op(n) for n in (1, 2)] == [("reference", 1), ("reference", 2)]
    assert dispatch.availability() == {"demo": {"cuda": ["nvcc was missing at build time"], "reference": []}}
    assert len(asked) == 1
    with pytest.raises(dispatch.BackendError, match="demo: backend cuda cannot: nvcc was missing at build time"):
        op(1, backend="cuda")


def test_nothing_left_lists_all_reasons():
    op = declare(triton=["too small"])
    op.backends.pop("reference")
    with pytest.raises(dispatch.BackendError) as caught:
        op(1, small=True)
    assert str(caught.value) == "demo: no backend can run this call: backend triton cannot: too small"


def test_every_public_operation_has_a_reference_of_the_same_name():
    helpers = {"masked_storage", "unpack_sites", "each_operation"}  # storage and pictures, no operations themselves
    functions = [name for name in ops.__all__ if name.islower() and name not in helpers]
    assert len(functions) == 22
    for name in functions:
        assert callable(getattr(ops, name)) and callable(getattr(ops.reference, name))
