"""Choices that change how fast a run computes, never what: each is declared once, beside what it chooses for.

A declaration names the candidates and the prior, which is what runs without a measurement. `value` is what holds in
this process: None until something was adopted, and then the place that asks falls back on its prior. So an operation
that is called outside of a run needs nothing of this.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from rcmstr_fast.fields import ConfigError

#: What a choice may be: something that JSON keeps.
Value = bool | int | str
#: Beginning of the names of choices between the backends of an operation, which need no declaration.
BACKEND = "backend."


@dataclass(frozen=True)
class Setting:
    """The run that is tuned, as far as candidates and priors depend on it.

    Attributes:
        device: cpu or cuda.
        processes: of the run.
        cpus: that the process may use.
        threads: of torch.
        config: the resolved configuration.
        stages: (h, w) of the stages of the masked pass, fine to coarse; empty where nothing is masked.
        visible: expected share of active sites of those stages.
        calls: backends that can run what a step asks of each operation, in the order of preference.
    """

    device: str
    processes: int = 1
    cpus: int = 1
    threads: int = 1
    config: Any = None
    stages: tuple[tuple[int, int], ...] = ()
    visible: float | None = None
    calls: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """Something that may be chosen by measurement.

    Attributes:
        name: dotted, unique.
        about: what is chosen, in a few words.
        part: what is timed for it (`train.trial`): step, built_step, fed_step, masked_pass, or an operation's name.
        gain: expected speed-up of what is timed; the largest is tuned first.
        candidates: of a run; fewer than two: there is nothing to choose.
        prior: of a run, one of its candidates.
        ordered: what has decided already (a variable, a field of the configuration); empty: nothing has.
        show: a candidate in words.
        apply: makes a value hold where asking for `value` is not enough, and returns what undoes it.
        verify: operation and backend that must agree with the reference with a candidate before it is timed.
    """

    name: str
    about: str
    part: str
    gain: float
    candidates: Callable[[Setting], Sequence[Value]]
    prior: Callable[[Setting], Value]
    ordered: Callable[[Setting], str] = lambda setting: ""
    show: Callable[[Value], str] = str
    apply: Callable[[Any], Callable[[], None]] | None = None
    verify: tuple[str, str] | None = None


_DECLARED: dict[str, Choice] = {}
_current: dict[str, Value] = {}


def declare(choice: Choice) -> Choice:
    """Add a choice; a second one of the same name replaces the first."""
    _DECLARED[choice.name] = choice
    return choice


def declared() -> dict[str, Choice]:
    """Every declared choice by name."""
    return dict(_DECLARED)


def backends_of(name: str, calls: Mapping[str, Sequence[str]]) -> Choice:
    """The choice between the backends that can run what a step asks of the operation `name`; the first is the prior."""
    usable = list(calls[name])
    return Choice(BACKEND + name, f"backend of {name}", name, 1.02, lambda setting: usable, lambda setting: usable[0])


def of_run(setting: Setting) -> list[Choice]:
    """What there is to choose in a run, the largest expected gain first."""
    found = [*_DECLARED.values(), *(backends_of(name, setting.calls) for name in setting.calls)]
    return sorted(found, key=lambda choice: -choice.gain)


def named(name: str, known: Sequence[str]) -> str:
    """`name`, if it is a known choice.

    Raises:
        ConfigError: it is not; offers the nearest.
    """
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, 1) or [k for k in known if name in k][:1]
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"only: expected one of {', '.join(sorted(known))}, got {name}{hint}")


def value(name: str) -> Any:
    """What holds for a choice in this process, or None: the prior."""
    return _current.get(name)


def current() -> dict[str, Value]:
    """Everything that was adopted in this process."""
    return dict(_current)


@contextmanager
def using(values: Mapping[str, Value]) -> Iterator[None]:
    """Let values hold while entered; names that this version does not know are left alone."""
    before = dict(_current)
    with ExitStack() as stack:
        for name, chosen in values.items():
            _current[name] = chosen
            apply = _DECLARED[name].apply if name in _DECLARED else None
            if apply is not None:
                stack.callback(apply(chosen))
        try:
            yield
        finally:
            _current.clear()
            _current.update(before)
