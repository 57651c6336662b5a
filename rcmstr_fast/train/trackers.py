"""Where the values of a run go beside its own files: TensorBoard, Weights & Biases, MLflow.

All have the two methods of `Tracker`. The outside ones are off unless asked for, are never required, and a failing one
is dropped with a warning: it never stops a run.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from rcmstr_fast.config import ConfigError

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
#: Values of a metrics line that are no curves.
_NOT_TRACKED = ("step", "seconds")

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes the numbers of a run."""

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Take the values of a step; None and names that are no curves are left out by the caller's `finite`."""

    def close(self) -> None:
        """Finish what was begun."""


class TensorBoard:
    """Event files in a folder.

    Args:
        folder: for the event files.
        step: steps done before; what an interrupted run wrote after it is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """A scalar each."""
        for name, value in finite(values).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; project, entity and mode come from its own WANDB_* variables.

    Args:
        run: the run folder: its name is the run's, and its files go in there.
        config: fields to show beside the curves.
        step: steps done before; a continued run folder continues the same run.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        import wandb

        kept = run / "wandb.id"
        name = kept.read_text(encoding="utf-8").strip() if step and kept.is_file() else wandb.util.generate_id()
        kept.write_text(name + "\n", encoding="utf-8")
        self._run = wandb.init(dir=str(run), name=run.name, id=name, resume="allow", config=dict(config))

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """One call for all values."""
        self._run.log(finite(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """A run of MLflow; server and experiment come from its own MLFLOW_* variables.

    Args:
        run: the run folder: its name is the run's.
        config: fields to show beside the curves.
        step: steps done before; a continued run folder continues the same run.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        import mlflow

        self._client, kept = mlflow, run / "mlflow.id"
        before = kept.read_text(encoding="utf-8").strip() if step and kept.is_file() else None
        begun = mlflow.start_run(run_id=before, run_name=run.name)
        kept.write_text(begun.info.run_id + "\n", encoding="utf-8")
        if before is None:
            mlflow.log_params({name: str(value)[:250] for name, value in _flat(config).items()})

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """One call for all values."""
        self._client.log_metrics(finite(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._client.end_run()


_MADE: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


class Trackers:
    """Several trackers as one; one that fails is named in the log once and left out from then on."""

    def __init__(self) -> None:
        self._kept: dict[str, Tracker] = {}

    def add(self, name: str, make: Callable[[], Tracker]) -> None:
        """Take up a tracker; where it cannot be made there is a warning and nothing else."""
        made = self._guarded(name, make)
        if made is not None:
            self._kept[name] = made

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Hand the values of a step to each."""
        for name, tracker in list(self._kept.items()):
            self._guarded(name, partial(tracker.log, step, values))

    def close(self) -> None:
        """Close each."""
        for name, tracker in list(self._kept.items()):
            self._guarded(name, tracker.close)
        self._kept.clear()

    def _guarded(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever another's library raises, the run is worth more
            reason = " ".join(str(error).split()) or type(error).__name__
            _log.warning("%s cannot be written (%s); training goes on without it", name, reason)
            self._kept.pop(name, None)
            return None


def open_trackers(names: Sequence[str], run: Path, config: Mapping[str, Any], step: int, tensorboard: Path) -> Trackers:
    """The trackers that were asked for.

    Args:
        names: of tensorboard, wandb and mlflow.
        run: the run folder.
        config: of the run.
        step: steps done before.
        tensorboard: folder of the event files.
    """
    trackers = Trackers()
    made: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(tensorboard, step),
        **{name: partial(make, run, config, step) for name, make in _MADE.items()},
    }
    for name in dict.fromkeys(names):
        trackers.add(name, made[name])
    return trackers


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker whose package is not installed, before a run begins."""
    import importlib.util

    for name in names:
        if name not in get_args(TrackerName):
            raise ConfigError(f"train.trackers: expected some of {', '.join(get_args(TrackerName))}, got {name!r}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"train.trackers: {name} is not installed; pip install 'rcmstr-fast[tracking]'")


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """The values that a curve can have."""
    return {name: float(x) for name, x in values.items() if x is not None and name not in _NOT_TRACKED}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
