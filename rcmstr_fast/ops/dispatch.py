"""Choice of a backend for each public operation.

An operation is declared once with its reference; faster backends register beside it. A user may order a backend, by the
argument `backend` or by RCMSTR_FAST_BACKEND: then that backend runs, or the call fails and lists every reason. Without
an order the automatic choice walks through `ORDER` and takes the first backend that has no reason against the call.

There are four kinds of reasons, each a list of sentences:
- `available`: the machine or the build lacks something; asked once in a process.
- `unsupported_reasons`: the backend cannot compute this call.
- `avoid`: it can, but would be slower than the next one.
- `refused`: it computed something wrong from known inputs, which `selfcheck` gives a compiled backend before the
  automatic choice first takes it.
Only the automatic choice asks for the last two. The backend of an operation that was measured to be the fastest
(`tuning`) is tried before the others.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from rcmstr_fast import env
from rcmstr_fast.ops import triton_backend
from rcmstr_fast.tuning import choices

ORDER = ("cuda", "cpp", "triton", "chunked", "reference")
#: Backends that are believed only after `selfcheck`: compiled themselves, or (chunked) with compiled parts.
CHECKED = ("cuda", "cpp", "triton", "chunked")

_log = logging.getLogger(__name__)
_OPERATIONS: dict[str, "Operation"] = {}


class BackendError(RuntimeError):
    """An ordered backend cannot run this call; the message lists every reason."""


@dataclass
class Backend:
    """One implementation of an operation.

    Attributes:
        run: called with the checked arguments of the public operation.
        unsupported_reasons: same arguments -> why this backend cannot compute the call; never raises, never
            synchronises.
        available: without arguments -> why this machine or build cannot run the backend at all.
        avoid: same arguments -> why the automatic choice should pass over the backend although it could run.
    """

    run: Callable[..., Any]
    unsupported_reasons: Callable[..., list[str]]
    available: Callable[[], list[str]]
    avoid: Callable[..., list[str]] = lambda *a, **k: []


@dataclass
class Operation:
    """A public operation and its backends, in the order in which they are tried.

    Attributes:
        name: of the operation.
        backends: by name.
        told: backends whose choice was logged.
        refused: backend -> what `selfcheck` found against it; a backend that was not checked yet is missing.
    """

    name: str
    backends: dict[str, Backend] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    refused: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        """Run on the ordered backend, else on the first of `ORDER` that can."""
        ordered = env.backend()
        if backend is None and ordered in self.backends:  # the variable orders the operations that have that backend
            backend = ordered
        if backend is not None or ordered not in (None, *ORDER):
            return self._ordered(backend or str(ordered), args, kwargs)
        refused: dict[str, list[str]] = {}
        measured = choices.value(choices.BACKEND + self.name)
        for name in ORDER if measured is None else (measured, *ORDER):
            candidate = self.backends.get(name)
            if candidate is None:
                continue
            reasons = candidate.available() or candidate.unsupported_reasons(*args, **kwargs)
            reasons = reasons or candidate.avoid(*args, **kwargs) or self.refusal(name)
            if not reasons:
                self._tell(name, refused)
                return candidate.run(*args, **kwargs)
            refused[name] = reasons
        raise BackendError(f"{self.name}: no backend can run this call: {_list(refused)}")

    def refusal(self, backend: str) -> list[str]:
        """What `selfcheck` has against a backend; checked at the first call, but never while a graph is made."""
        if backend not in CHECKED or backend in self.refused or self.name not in _OPERATIONS:
            return self.refused.get(backend, [])
        if torch.compiler.is_compiling() or (backend != "cpp" and _capturing()):
            return []
        from rcmstr_fast.ops import selfcheck  # its cases call the public operations, which are made of this module

        self.refused[backend] = []  # the check itself runs the backend
        self.refused[backend] = selfcheck.reasons(self.name, backend)
        return self.refused[backend]

    def usable(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """Backends among which the automatic choice of this call could choose, the preferred one first."""
        return tuple(
            name
            for name in ORDER
            if (made := self.backends.get(name)) is not None
            and not (made.available() or made.unsupported_reasons(*args, **kwargs) or made.avoid(*args, **kwargs))
            and not self.refusal(name)
        )

    def _ordered(self, order: str, args: tuple, kwargs: dict) -> Any:
        if order not in ORDER:
            raise BackendError(f"{self.name}: backend must be one of {', '.join(ORDER)}, got {order!r}")
        if order not in self.backends:
            raise BackendError(f"{self.name}: backend {order!r} does not exist for it, only {', '.join(self.backends)}")
        chosen = self.backends[order]
        reasons = chosen.available() or chosen.unsupported_reasons(*args, **kwargs)
        if reasons:
            raise BackendError(f"{self.name}: {_list({order: reasons})}")
        return chosen.run(*args, **kwargs)

    def _tell(self, name: str, refused: dict[str, list[str]]) -> None:
        """Log a fallback once an operation and backend."""
        if refused and name not in self.told and not torch.compiler.is_compiling():  # a log call breaks the graph
            self.told.add(name)
            _log.debug("%s runs on %s: %s", self.name, name, _list(refused))


def _list(refused: dict[str, list[str]]) -> str:
    return "; ".join(f"backend {name} cannot: {', '.join(reasons)}" for name, reasons in refused.items())


def _capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def operations() -> dict[str, Operation]:
    """Every declared operation by name."""
    return dict(_OPERATIONS)


def operation(name: str, reference: Callable[..., Any]) -> Operation:
    """Declare the public operation `name` with its reference implementation."""
    made = Operation(name)
    made.backends["reference"] = Backend(reference, lambda *a, **k: [], lambda: [])
    _OPERATIONS[name] = made
    return made


def only_reference(name: str, backend: str | None) -> None:
    """Raise BackendError where `backend` orders something else than the plain PyTorch that `name` consists of."""
    if backend not in (None, "reference"):
        raise BackendError(f"{name}: backend {backend!r} does not exist for it, only reference")


def _once(ask: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """`ask`, asked at the first call only (functools.cache would warn under torch.compile)."""
    known: list[list[str]] = []

    def answer() -> list[str]:
        if not known:
            known.append(ask())
        return known[0]

    return answer


def register(
    op: Operation,
    backend: str,
    run: Callable[..., Any],
    *,
    unsupported_reasons: Callable[..., list[str]] = lambda *a, **k: [],
    available: Callable[[], list[str]] = lambda: [],
    avoid: Callable[..., list[str]] = lambda *a, **k: [],
) -> None:
    """Add a backend to an operation; `available` is asked once a process."""
    op.backends[backend] = Backend(run, unsupported_reasons, _once(available), avoid)


def register_triton(
    op: Operation,
    run: Callable[..., Any],
    unsupported_reasons: Callable[..., list[str]],
    avoid: Callable[..., list[str]] = triton_backend.avoid_on_cpu,
) -> None:
    """Add `run` to an operation as its backend "triton", available where `triton_backend` has no reason against it."""
    available = triton_backend.reasons
    register(op, "triton", run, unsupported_reasons=unsupported_reasons, available=available, avoid=avoid)


def availability() -> dict[str, dict[str, list[str]]]:
    """operation -> backend -> reasons against it on this machine (empty list: usable); for `rcmstr doctor`."""
    return {
        name: {b: op.backends[b].available() for b in ORDER if b in op.backends} for name, op in _OPERATIONS.items()
    }
