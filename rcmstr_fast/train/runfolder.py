"""The run folder: created once, continued with the same configuration only."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.train import checkpoint

_log = logging.getLogger(__name__)

#: Fields that may change when a run is continued: its length, what it writes when, how data are read ahead, how a
#: batch and the queues are divided, what changes a step's speed only, and where the data are (`identity` recognises them).
MAY_CHANGE = frozenset(
    (
        "run",
        "data.roots",
        "data.workers",
        "data.prefetch",
        "method.queue",
        "train.epochs",
        "train.steps",
        "train.accumulate",
        "train.log_every",
        "train.save_every",
        "train.save_minutes",
        "train.picture_every",
        "train.trackers",
        "train.max_nonfinite",
        "train.timeout_minutes",
        "train.probe_every",
        "train.probe_data",
        "train.probe_words",
        "train.probe_charset",
        "train.cuda_graph",
        "train.compile",
        "train.checkpoint_activations",
        "train.tune",
    )
)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to `a.b` names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Fields that differ and may not: `name: old -> new`."""
    before, after = flatten(old), flatten(new)
    names = [*after, *(name for name in before if name not in after)]
    return [
        f"{name}: {before.get(name, 'absent')!r} -> {after.get(name, 'absent')!r}"
        for name in names
        if name not in MAY_CHANGE and before.get(name) != after.get(name)
    ]


def as_utf8(text: str) -> bytes:
    """Text with parts that are no UTF-8 (names of files) as the escapes that YAML and JSON read back."""
    return text.encode("utf-8", "backslashreplace")


def of_this_version(held: dict[str, Any], config: PretrainConfig) -> dict[str, Any]:
    """The configuration of a run as this version would have written it.

    A field that did not exist yet had what is now its default; fields of `method` that the method does not have any
    more (version 0.1 had one set of fields for all methods) had no effect.
    """
    parts: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    made = {name: held.get(name, value) for name, value in parts.items() if not dataclasses.is_dataclass(value)}
    for name, part in parts.items():
        if dataclasses.is_dataclass(part):
            former, default = held.get(name), cast(Callable[[], Any], type(part))
            made[name] = dataclasses.asdict(default()) | (former if isinstance(former, dict) else {})
    known = {f.name for f in dataclasses.fields(config.method)}
    made["method"] = {name: value for name, value in made["method"].items() if name in known}
    if made["method"].get("bn_group_size") == 0 and "bn_shuffle" in known:  # it was on by default, without an effect
        made["method"]["bn_shuffle"] = vars(config.method)["bn_shuffle"]
    return made


class RunFolder:
    """Paths of a run and the files that describe it.

    Args:
        path: the run folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.text = self.path / "log.txt"
        self.tensorboard = self.path / "tensorboard"
        self.pictures = self.path / "views.png"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"
        self.encoder = self.path / "encoder.safetensors"

    def read_config(self) -> dict[str, Any] | None:
        """`config.yaml` of the run that is in the folder, or None for a new or empty folder.

        Raises:
            ConfigError: the folder holds something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run: {self.path} must be a folder, it is a file")
        if not self.path.exists() or all(path.name.startswith(".") for path in self.path.iterdir()):
            return None
        if not self.config.is_file():
            raise ConfigError(f"run: {self.path} is not empty and not a run (no config.yaml); name another folder")
        try:
            held = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{self.config}: expected the configuration of a run, it cannot be read") from error
        parts = ("method", "train", "optim")
        if not isinstance(held, dict) or not all(isinstance(held.get(part), dict) for part in parts):
            raise ConfigError(f"{self.config}: expected the configuration of a pretraining run, it is some other file")
        return held

    def adopt(self, config: PretrainConfig) -> PretrainConfig:
        """Check that `config` may be run here, before anything is written.

        That is: the folder is new or empty, or holds a run with this configuration, or one that never saved anything,
        such as one whose first step did not fit into the memory.

        A warm-up that `config` leaves open is the one of the run that is continued.

        Returns:
            `config`.
        Raises:
            ConfigError: naming every field that differs, with both values.
        """
        held = self.read_config()
        if held is None or not self.checkpoints.exists():
            return config
        if config.optim.warmup_steps is None:
            config.optim.warmup_steps = held["optim"].get("warmup_steps")
        changed = differences(of_this_version(held, config), dataclasses.asdict(config))
        if changed:
            raise ConfigError(
                f"run: {self.path} holds a run with another configuration ({'; '.join(changed)}); "
                "name another folder or restore these fields"
            )
        return config

    def computed_with(self) -> dict[str, Any] | None:
        """What the last session of the run computed with, {} if it does not say; None where there is no session.

        One that never saved anything does not count: the run begins anew.
        """
        if not self.checkpoints.exists():
            return None
        sessions = self._sessions()
        held = sessions[-1].get("tuned") if sessions and isinstance(sessions[-1], dict) else None
        return (held if isinstance(held, dict) else {}) if sessions or self.config.is_file() else None

    def _sessions(self) -> list[Any]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return list(json.loads((self.path / "environment.json").read_text(encoding="utf-8"))["sessions"])
        return []

    def write_description(self, config: Any, session: dict[str, Any]) -> None:
        """Write the configuration, a dataclass, to `config.yaml` and add this session to `environment.json`.

        Args:
            config: of the run.
            session: of `environment.session`; JSON values.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
        checkpoint.write_whole(self.config, lambda file: file.write(as_utf8(text)))
        path = self.path / "environment.json"
        sessions = [*self._sessions(), session]
        text_json = json.dumps({"sessions": sessions}, indent=1, ensure_ascii=False) + "\n"
        checkpoint.write_whole(path, lambda file: file.write(as_utf8(text_json)))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and hold it; the lock ends with the process, however that ends.

        Folders that were made for it and are still empty at the end are removed.

        Raises:
            ConfigError: another process holds it, or it cannot be created.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(f"run: cannot create the folder {self.path}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"run: {self.path} is in use by another process") from error
            except OSError as error:
                _log.debug("%s: no lock on this file system (%s)", self.path, error)
            yield
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()
