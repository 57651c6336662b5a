"""Before the first step: check the kernels, tune what a run may choose, tell the other processes, say what was found."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from rcmstr_fast import env
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.ops import dispatch, selfcheck
from rcmstr_fast.train.distributed import World, peers
from rcmstr_fast.train.plan import Plan
from rcmstr_fast.train.trial import Trial
from rcmstr_fast.tuning import choices, engine, record
from rcmstr_fast.tuning.choices import Value
from rcmstr_fast.tuning.engine import Outcome

#: Steps from which on `train.tune=auto` measures: below, measuring takes longer than it saves.
LEAST_STEPS = 1000
#: Seconds that a run spends on tuning at most, but for the first call of a choice that takes longer than was left.
SECONDS = 60.0
#: Of what is left, what one choice may take: those that follow want some too.
_SHARE = 0.4
_log = logging.getLogger(__name__)


@dataclass
class Findings:
    """What a run computes with.

    Attributes:
        values: choice -> value, of those that were decided.
        verdicts: operation -> backend -> reasons against it, of those that were checked.
        machine: device, capability and versions that this was found on.
        rows: one a choice, `Outcome.row`.
        seconds: of tuning; 0 where nothing was timed now.
        source: in a few words.
    """

    values: dict[str, Value] = field(default_factory=dict)
    verdicts: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    source: str = "priors"

    @property
    def refused(self) -> dict[str, dict[str, list[str]]]:
        """The verdicts that have a reason."""
        found = {name: {b: reasons for b, reasons in of.items() if reasons} for name, of in self.verdicts.items()}
        return {name: of for name, of in found.items() if of}

    def kept(self) -> dict[str, Any]:
        """What `environment.json` of a run holds."""
        return {"choices": self.values, "refused": self.refused, "source": self.source, "machine": self.machine}


def wanted(config: PretrainConfig, plan: Plan) -> bool:
    """Whether a run is to be tuned."""
    asked = config.train.tune if config.train.tune != "auto" else env.tune() or "auto"
    return plan.total_steps >= LEAST_STEPS if asked == "auto" else asked == "on"


def key_of(config: PretrainConfig, plan: Plan, world: World) -> str:
    """Key of runs that compute alike: network, method, shapes, dtype, switches and what the environment orders."""
    train = config.train
    switches = (train.precision, train.cuda_graph, train.compile, train.checkpoint_activations, train.accumulate)
    data = config.data
    facts = {
        "model": asdict(config.model),
        "method": asdict(config.method),
        "optim": config.optim.name,
        "batch": plan.micro_batch,
        "processes": world.world_size,
        "switches": switches,
        "data": (data.decoder, data.augment, data.workers, data.prefetch, data.rotate),
        "ordered": env.ordered(),
        "threads": torch.get_num_threads(),
    }
    return record.key_of(facts)


@contextlib.contextmanager
def adopted(
    config: PretrainConfig,
    plan: Plan,
    world: World,
    held: dict[str, Any] | None,
    trial: Callable[[], Trial],
) -> Iterator[Findings]:
    """Decide what a run computes with and let it hold while entered.

    Args:
        config: resolved.
        plan: its lengths.
        world: this process.
        held: what an earlier session of the run computed with (`Findings.kept`), {} where it did not say, which means
            the priors; None: this is the first session.
        trial: makes what candidates are timed on.
    """
    found = _shared(world, lambda: _decide(config, plan, world, held, trial))
    for name, operation in dispatch.operations().items():
        operation.refused.update(found.verdicts.get(name, {}))
    with choices.using(found.values):
        yield found


def _shared(world: World, decide: Callable[[], Findings]) -> Findings:
    """The findings of the first process on the same kind of device, which alone looks for them."""
    if world.world_size == 1:
        return decide()
    kind = record.key_of(record.machine(world.device))
    everyone: list[Any] = [None] * world.world_size
    with peers():
        dist.all_gather_object(everyone, kind)
    leader = everyone.index(kind)
    mine = decide() if leader == world.rank else None
    with peers():
        dist.all_gather_object(everyone, mine)
    return everyone[leader]


def _decide(
    config: PretrainConfig, plan: Plan, world: World, held: dict[str, Any] | None, trial: Callable[[], Trial]
) -> Findings:
    about = record.machine(world.device)
    if held is not None and (not held or held.get("machine", {}).get("device") == about["device"]):
        return Findings(
            dict(held.get("choices", {})), dict(held.get("refused", {})), about, source="those of the run so far"
        )
    found = Findings(machine=about)
    found.verdicts = check()
    if wanted(config, plan):
        key = key_of(config, plan, world)
        known = record.read(world.device)["runs"].get(key)
        if known is not None and isinstance(known.get("values"), dict) and known.get("done"):
            found.values, found.rows, found.source = known["values"], known.get("rows", []), "the record"
        else:
            tune(found, key, world.device, trial, SECONDS)
    _say(found)
    return found


def check(*, again: bool = False) -> dict[str, dict[str, list[str]]]:
    """`selfcheck.check_all`, unless a backend is ordered."""
    return selfcheck.check_all(again=again) if env.backend() is None else {}


def tune(
    found: Findings,
    key: str,
    device: torch.device,
    make: Callable[[], Trial],
    seconds: float,
    *,
    only: Sequence[str] = (),
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> None:
    """Time the candidates of every choice of a run, put what was found into `found`, and keep it.

    Args:
        found: changed in place.
        key: of the run, `key_of`.
        device: of this process.
        make: makes what candidates are timed on.
        seconds: for the measurements together.
        only: names of choices; empty: all.
        report: told each outcome as it comes.
    Raises:
        ConfigError: `only` names no choice.
    """
    began = time.perf_counter()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _quiet_loaders():
        try:
            trial = make()
        except (RuntimeError, MemoryError) as error:  # out of memory with a second copy of the method, for one
            engine.release(device)
            _log.warning("nothing is tuned, priors are taken: %s", engine.reason(error))
            return
        begun = time.perf_counter()  # the budget is for measuring, whatever the first step took
        known = choices.of_run(trial.setting)
        for name in only:
            choices.named(name, [choice.name for choice in known])
        for choice in known:
            if (only and choice.name not in only) or not trial.has(choice.part):
                continue
            left = seconds - (time.perf_counter() - begun)
            outcome = _outcome(choice, trial, device, found.values, left)
            if outcome is not None:
                found.values[choice.name] = outcome.chosen
                found.rows.append(outcome.row())
                report(outcome)
        del trial
    engine.release(device)
    found.seconds, found.source = time.perf_counter() - began, "measured now"
    runs = {"values": found.values, "rows": found.rows, "seconds": found.seconds, "done": not only}
    record.update(device, lambda mine: mine["runs"].update({key: {**mine["runs"].pop(key, {}), **runs}}))


@contextlib.contextmanager
def _quiet_loaders() -> Iterator[None]:
    """Every trial opens a loader, which would name its decoder each time."""
    loaders = logging.getLogger("rcmstr_fast.data")
    before = loaders.level
    loaders.setLevel(logging.WARNING)
    try:
        yield
    finally:
        loaders.setLevel(before)


def _outcome(
    choice: choices.Choice, trial: Trial, device: torch.device, values: dict[str, Value], left: float
) -> Outcome | None:
    """What comes of one choice; None where there is nothing to choose."""
    setting = trial.setting
    candidates = list(choice.candidates(setting))
    if len(candidates) < 2:
        return None
    prior, ordered = choice.prior(setting), choice.ordered(setting)
    if ordered:
        return None
    if left <= 0:
        outcome = Outcome(choice.name, prior, prior, why="no time was left")
        outcome.shown = choice.show(prior)
    else:
        # What was decided before holds while the next choice is timed.
        with choices.using(values):
            runs = {value: _maker(trial, choice, value) for value in candidates}
            # Each call of a fed step opens the data anew, so an earlier one prepares nothing for it.
            fed: dict[str, Any] = {"warm_up": 0, "settled": trial.keeps_up} if choice.part == "fed_step" else {}
            outcome = engine.contest(choice.name, prior, runs, device, _SHARE * left, show=choice.show, **fed)
    outcome.about = choice.about
    return outcome


def _maker(trial: Trial, choice: choices.Choice, value: Value) -> Callable[[], Callable[[], Any]]:
    def make() -> Callable[[], Any]:
        if choice.verify is not None:
            operation, backend = choice.verify
            with choices.using({choice.name: value}):
                verdict = selfcheck.check(operation, backend, selfcheck.device_of(backend))
            if verdict.reasons:
                raise RuntimeError(f"it disagrees with the reference: {'; '.join(verdict.reasons)}")
        return trial.run(choice, value)

    return make


def summary(found: Findings) -> str:
    """The line of the log."""
    about = found.machine
    head = (
        f"{about.get('device')} ({about.get('capability')}), torch {about.get('torch')}, triton {about.get('triton')}"
    )
    refused = [(f"{name} {b}", reasons) for name, of in found.refused.items() for b, reasons in of.items()]
    checked, parts = sum(map(len, found.verdicts.values())), []
    if checked:
        parts.append(f"{checked - len(refused)} of {checked} compiled backends agree with the reference")
    parts += [f"{name} refused: {'; '.join(reasons)}" for name, reasons in refused]
    if found.rows:
        gains = ", ".join(
            f"{row['about']} {row['shown']}" + (f" ({row['gain']:.2g}x)" if row["gain"] > 1 else "")
            for row in found.rows
        )
        when = f"tuned in {found.seconds:.0f} s" if found.seconds else "tuned before"
        parts.append(f"{when}: {gains}. Kept in {record.path()}; `rcmstr tune --again` repeats")
    return f"{head}: {'. '.join(parts)}" if parts else f"{head}: {found.source}"


def _say(found: Findings) -> None:
    _log.log(logging.INFO if found.rows or found.refused else logging.DEBUG, "%s", summary(found))
