"""Faults of a compiled backend, planted in the C++ batch norm: what the toy method of the trainer's tests runs on."""

import torch

from rcmstr_fast.ops import dispatch
from rcmstr_fast.ops.batch_norm import cpu


class _WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is a tenth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.1


class _FailsBackward(torch.autograd.Function):
    """The identity, whose backward cannot be launched."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("CUDA error: too many resources requested for launch")


def _compile(x, weight, bias, **options):
    raise RuntimeError("ptxas error: out of registers")


def _launch(x, weight, bias, **options):
    return cpu.grouped_batch_norm(_FailsBackward.apply(x), weight, bias, **options)


def _nan(x, weight, bias, **options):
    found = cpu.grouped_batch_norm(x, weight, bias, **options)
    return found._replace(out=found.out * torch.nan)


def _one_row(x, weight, bias, **options):
    """One percent too large at the last place of the last image, which lies in the last, partial tile."""
    found = cpu.grouped_batch_norm(x, weight, bias, **options)
    factor = torch.ones(found.out.shape)
    factor[(-1, slice(None), *[-1] * (factor.dim() - 2))] = 1.01
    return found._replace(out=found.out * factor)


def _gradient(x, weight, bias, **options):
    return cpu.grouped_batch_norm(x, _WrongGradient.apply(weight), bias, **options)


#: Fault -> what runs in the place of the C++ function, and what the reason says of it.
FAULTS = {
    "compile": (_compile, "ptxas error"),
    "launch": (_launch, "too many resources"),
    "nan": (_nan, "is not finite"),
    "one row": (_one_row, "has an error of"),
    "gradient": (_gradient, "the gradient of weight has an error of 0.1"),
}


def slow(x, weight, bias, **options):
    """Right, but slow, by the clock of the test."""
    return cpu.grouped_batch_norm(x, weight, bias, **options)


def planted(monkeypatch, fault):
    """Plant a fault for a test; the list grows with every call of the backend."""
    operation, asked = dispatch.operations()["grouped_batch_norm"], []
    run = slow if fault == "slow" else FAULTS[fault][0]

    def faulty(*args, **options):
        asked.append(1)
        return run(*args, **options)

    monkeypatch.setattr(operation.backends["cpp"], "run", faulty)
    monkeypatch.setattr(operation, "refused", {})
    return asked
