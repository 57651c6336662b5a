"""A run's own step as something to time: what the candidates of a choice are tried on before the first step.

A second trainer with the same configuration takes steps on real batches of the run and is forgotten, so the run itself
starts as if nothing had been measured. Of its first step the calls of every operation and of the masked pass are kept,
so that what is chosen for one of them is timed on just that.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rcmstr_fast import env
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.methods.protocol import Batch
from rcmstr_fast.ops import dispatch
from rcmstr_fast.ops.masked import Layer
from rcmstr_fast.tuning import choices
from rcmstr_fast.tuning.choices import Choice, Setting, Value

Run = Callable[[], Any]
#: Steps of a turn that also waits for its data, and batches that the other trials go through.
_FED, _BATCHES = 4, 2
#: A share of waiting for data below which another loader could not gain what `engine.WORTH` asks for.
_WAITING = 0.02
#: Steps after which whatever is recorded or compiled on a GPU is.
_GRAPHED = 12


@dataclass
class Feed:
    """How a trial gets what it needs of the run.

    Attributes:
        config: resolved.
        device: of this process.
        stepper: makes a trainer that is forgotten and returns its step: a call on a step's micro-batches.
        method_of: the method inside a step that `stepper` has made.
        batches: opens the data of the run for this process alone.
        processes: of the run.
    """

    config: PretrainConfig
    device: torch.device
    stepper: Callable[[], Callable[[list[Batch]], None]]
    method_of: Callable[[Any], nn.Module]
    batches: Callable[[], Generator[list[Batch], None, None]]
    processes: int = 1


@dataclass
class _Call:
    """A recorded call: `run` with its arguments, which are its own."""

    run: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    kind: str
    autocast: bool
    backends: tuple[str, ...] = ()

    @classmethod
    def of(cls, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any], kind: str) -> "_Call":
        """A call that is being made now on a kind of device."""
        own = [tree_map_only(Tensor, _own, given) for given in (args, kwargs)]
        return cls(run, own[0], own[1], kind, torch.is_autocast_enabled(kind))

    def again(self) -> None:
        """Run forward and, where something takes a gradient, backward."""
        args, kwargs = (tree_map_only(Tensor, _leaf, given) for given in (self.args, self.kwargs))
        with torch.enable_grad():
            with torch.autocast(self.kind, torch.bfloat16, enabled=self.autocast):
                results = self.run(*args, **kwargs)
            found = [x for x in _tensors(results) if x.requires_grad]
            if found:
                torch.autograd.backward([x.float().square().sum() for x in found])


@dataclass
class Trial:
    """The parts of a step that candidates are timed on.

    Args:
        feed: of the run.

    Attributes:
        setting: of the run, as the declarations of choices ask for it.
    """

    feed: Feed
    setting: Setting = field(init=False)

    def __post_init__(self) -> None:
        source = self.feed.batches()
        try:
            self._batches = list(itertools.islice(source, _BATCHES))
        finally:
            source.close()
        self._step = self.feed.stepper()
        self._waited = 1.0
        self._calls: dict[str, _Call] = {}
        self._masked: tuple[nn.Module, _Call] | None = None
        self._record()
        stages, visible = self._masked_stages()
        calls = {name: call.backends for name, call in self._calls.items() if call.backends}
        self.setting = Setting(
            self.feed.device.type,
            self.feed.processes,
            env.threads(),
            torch.get_num_threads(),
            self.feed.config,
            stages,
            visible,
            calls,
        )

    def run(self, choice: Choice, value: Value) -> Run:
        """One call of the choice's part with a candidate.

        Raises:
            Exception: whatever making it raises.
        """
        part = self._part(choice.part, {choice.name: value})

        def once() -> None:
            with choices.using({choice.name: value}):
                part()

        return once

    def has(self, part: str) -> bool:
        """Whether the run's step has this part."""
        return part in ("step", "built_step", "fed_step", *self._calls) or (
            part == "masked_pass" and bool(self._masked)
        )

    def _part(self, part: str, values: dict[str, Value]) -> Run:
        if part in self._calls:
            return self._calls[part].again
        if part == "masked_pass" and self._masked is not None:
            return self._masked[1].again
        if part == "fed_step":
            return self._fed
        step = self._step
        if part == "built_step":  # what is decided when a trainer is made
            with choices.using(values):
                step = self.feed.stepper()
                for _ in range(_GRAPHED if self.feed.device.type == "cuda" else 0):
                    step(self._batches[0])
        coming = itertools.cycle(self._batches)
        return lambda: step(next(coming))

    def keeps_up(self) -> str:
        """That the data of the last fed steps came in time, in words; empty: the steps waited for them."""
        return f"steps wait {self._waited:.1%} of their time for data" if self._waited < _WAITING else ""

    def _fed(self) -> None:
        source, waited = self.feed.batches(), 0.0
        try:
            for batches in itertools.islice(source, 1):  # whose wait is that for the start of the workers
                self._step(batches)
            began = asked = time.perf_counter()
            for batches in itertools.islice(source, _FED - 1):
                waited += time.perf_counter() - asked
                self._step(batches)
                asked = time.perf_counter()
            self._waited = waited / max(asked - began, 1e-9)
        finally:
            source.close()

    def _record(self) -> None:
        """Take one step and keep what it calls."""
        method = self.feed.method_of(self._step)
        with contextlib.ExitStack() as stack:
            for name, operation in dispatch.operations().items():
                for backend, made in operation.backends.items():
                    stack.enter_context(_replaced(made, "run", self._recorder(name, backend, made.run)))
            for module in method.modules():
                if hasattr(module, "forward_masked"):
                    stack.enter_context(_replaced(module, "forward_masked", self._masked_recorder(module)))
            self._step(self._batches[0])

    def _recorder(self, name: str, backend: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            kept = self._calls.get(name)
            if kept is None or _size(kept) < _elements((args, kwargs)):  # the largest of a step stands for all
                operation = dispatch.operations()[name]
                kept = _Call.of(operation, args, kwargs, self.feed.device.type)
                # Which backend a masked layer takes follows from the storage of its stage.
                layers = bool(args) and isinstance(args[0], Layer)
                kept.backends = () if env.backend() or layers else operation.usable(*args, **kwargs)
                self._calls[name] = kept
            return run(*args, **kwargs)

        return recorded

    def _masked_recorder(self, module: nn.Module) -> Callable[..., Any]:
        original = cast(Callable[..., Any], module.forward_masked)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._masked is None:
                self._masked = module, _Call.of(original, args, kwargs, self.feed.device.type)
            return original(*args, **kwargs)

        return recorded

    def _masked_stages(self) -> tuple[tuple[tuple[int, int], ...], float | None]:
        """Stages of the recorded masked pass and the share of sites that it sees."""
        if self._masked is None or not hasattr(self._masked[0], "stage_sizes"):
            return (), None
        module, call = self._masked
        images, masks = call.args[:2]
        sizes = module.stage_sizes(*images.shape[2:])  # type: ignore[operator]
        return tuple((int(h), int(w)) for h, w in sizes), masks.visible


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let an attribute of an object be another one while entered."""
    held = vars(owner).get(name, owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if held is owner:
            delattr(owner, name)
        else:
            setattr(owner, name, held)


def _own(x: Tensor) -> Tensor:
    """A copy that keeps the memory format and whether a gradient was asked for."""
    return x.detach().clone().requires_grad_(x.requires_grad)


def _leaf(x: Tensor) -> Tensor:
    """The same values as a leaf of a new graph."""
    return x.detach().requires_grad_(x.requires_grad)


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, tree)
    return found


def _elements(tree: Any) -> int:
    return sum(x.numel() for x in _tensors(tree))


def _size(call: _Call) -> int:
    return _elements((call.args, call.kwargs))
