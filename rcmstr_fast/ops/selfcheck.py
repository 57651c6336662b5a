"""Whether a compiled backend computes on this machine what the reference computes.

The first time that the automatic choice would take a compiled backend of an operation, the backend runs the small inputs
of `check_cases`, forward and every gradient, beside the reference in float64. One that does not compile, raises, gives
NaN or disagrees is refused with its reason, like a backend that cannot run a call, and the next one is taken. Verdicts are
kept with the record of the machine (`tuning.record`), so that a second process pays nothing.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import dispatch, triton_backend
from rcmstr_fast.ops.check_cases import CASES, TOLERANCE, Case, Tensors, normal
from rcmstr_fast.tuning import record

#: An error of this many times eager PyTorch's own error is agreement too.
_AS_EAGER = 3.0
_log = logging.getLogger(__name__)


@dataclass
class Verdict:
    """What the check of one backend found.

    Attributes:
        reasons: why it is refused; empty: it agrees.
        error: largest error, as a share of the largest expected magnitude.
        eager: the same of the reference in the same dtype.
        ms: that all its cases took, compiling included.
        cases: that it could run.
    """

    reasons: list[str] = field(default_factory=list)
    error: float = 0.0
    eager: float = 0.0
    ms: float = 0.0
    cases: int = 0


class _Disagrees(Exception):
    """A result that is not the reference's; the message says which and how far."""


def device_of(backend: str) -> torch.device:
    """Where a backend is checked."""
    on_cpu = backend in ("cpp", "chunked", "reference") and not (backend == "chunked" and torch.cuda.is_available())
    if on_cpu or triton_backend.interpreted() or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def reasons(operation: str, backend: str, *, again: bool = False) -> list[str]:
    """Why a backend is refused on this machine: from the record (unless `again`), else by checking it now."""
    if operation not in CASES:
        return []
    device = device_of(backend)
    name = f"{operation}/{backend}"
    known = record.read(device)["checks"].get(name)
    if not again and isinstance(known, dict) and isinstance(known.get("reasons"), list):
        return [str(reason) for reason in known["reasons"]]
    found = check(operation, backend, device)
    if found.reasons:
        _log.warning("%s: backend %s is refused: %s", operation, backend, "; ".join(found.reasons))
    record.update(device, lambda mine: mine["checks"].update({name: asdict(found)}))
    return found.reasons


def check_all(*, again: bool = False) -> dict[str, dict[str, list[str]]]:
    """Decide about every backend that this machine can run: operation -> backend -> reasons against it."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, operation in dispatch.operations().items():
        for backend in operation.backends:
            slow = backend == "triton" and triton_backend.interpreted()  # it runs only on order
            if backend in dispatch.CHECKED and not slow and not operation.backends[backend].available():
                if again:
                    operation.refused[backend] = reasons(name, backend, again=True)
                found.setdefault(name, {})[backend] = operation.refusal(backend)
    return found


def check(operation: str, backend: str, device: torch.device) -> Verdict:
    """Run every case of an operation on a backend and compare; never raises."""
    verdict, began = Verdict(), time.perf_counter()
    # A thread of its own has neither the caller's autocast nor its inference mode, hooks or dispatch modes.
    thread = threading.Thread(target=_run_cases, args=(operation, backend, device, verdict), name="selfcheck")
    thread.start()
    thread.join()
    verdict.ms = 1e3 * (time.perf_counter() - began)
    return verdict


def _run_cases(operation: str, backend: str, device: torch.device, verdict: Verdict) -> None:
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            for case in CASES[operation]():
                for dtype in case.dtypes if case.device in ("", device.type) else ():
                    compare(case, backend, dtype, device, verdict)
    except _Disagrees as error:
        verdict.reasons.append(str(error))
    except Exception as error:  # a kernel may fail with any type
        verdict.reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def compare(case: Case, backend: str, dtype: torch.dtype, device: torch.device, verdict: Verdict) -> None:
    """Run a case on a backend and add what is found to `verdict`; raises whatever running it raises, or `_Disagrees`."""
    given = _cast(case.make(), dtype)
    try:
        mine = _results(case, backend, given, device)
    except dispatch.BackendError:
        return  # it says itself that it cannot run this call
    exact = _results(case, "reference", _cast(given, torch.float64), device)
    eager = _results(case, "reference", given, device)
    operands = torch.float16 if backend in case.half else dtype
    limit = case.tolerance or TOLERANCE[operands]
    for (what, got), (_, want), (_, other) in zip(mine, exact, eager, strict=True):
        if got.shape != want.shape:
            raise _Disagrees(f"{case.name}: {what} has the shape {list(got.shape)}, not {list(want.shape)}")
        error, of_eager = _error(got, want, case), _error(other, want, case)
        verdict.eager = max(verdict.eager, of_eager)
        verdict.error = max(verdict.error, error if math.isfinite(error) else math.inf)
        allowed = max(limit, _AS_EAGER * of_eager)
        if not error <= allowed:
            how = "is not finite" if math.isnan(error) else f"has an error of {error:.2g} (limit {allowed:.2g})"
            raise _Disagrees(f"{case.name}, {str(dtype).removeprefix('torch.')}: {what} {how}")
    verdict.cases += 1


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Floating-point tensors in another dtype; those whose name ends with a colon stay in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: x.to(wide if name.endswith(":") else dtype) if x.is_floating_point() else x for name, x in tensors.items()
    }


def _results(case: Case, backend: str, given: Tensors, device: torch.device) -> list[tuple[str, Tensor]]:
    """Results and gradients by name, on the CPU in float64."""
    moved = {name: x.detach().clone().to(device) for name, x in given.items()}
    leaves = [moved[name].requires_grad_() for name in case.leaves]
    found = case.call(moved, backend)
    named = [(f"result {i}" if len(found) > 1 else "the result", x) for i, x in enumerate(found)]
    if leaves:
        made = [x for x in found if x.requires_grad]
        weights = [normal(*x.shape, seed=100 + i).to(x) for i, x in enumerate(made)]
        total = torch.stack([(x * w).sum() for x, w in zip(made, weights, strict=True)]).sum()
        gradients = torch.autograd.grad(total, leaves)
        named += [(f"the gradient of {name.rstrip(':')}", g) for name, g in zip(case.leaves, gradients, strict=True)]
    return [(name, x.detach().double().cpu()) for name, x in named]


def _error(got: Tensor, want: Tensor, case: Case) -> float:
    """Largest difference over the largest magnitude; NaN where a finite number was expected and is not there."""
    if not want.numel():
        return 0.0
    difference = (got - want).abs().flatten()
    if not bool(torch.isfinite(difference).all()):
        return math.nan
    allowed = int(case.outliers * difference.numel())
    largest = difference.topk(allowed + 1).values[-1] if allowed else difference.max()
    return float(largest / want.abs().max().clamp(min=case.floor))


def rows(names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Check anew and list: operation, backend, and the verdict's fields; for `rcmstr doctor --check`."""
    found = []
    for name, operation in dispatch.operations().items():
        if names is not None and name not in names:
            continue
        for backend in (b for b in dispatch.ORDER if b in operation.backends and b in dispatch.CHECKED):
            missing = operation.backends[backend].available()
            verdict = Verdict(reasons=list(missing)) if missing else check(name, backend, device_of(backend))
            found.append({"operation": name, "backend": backend, "missing": bool(missing), **asdict(verdict)})
    return found
