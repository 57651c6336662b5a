"""Whose a checkpoint is: the configuration and the data it belongs to, and what is different now that it goes on."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rcmstr_fast import env
from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.ops import dispatch
from rcmstr_fast.ops.masked import storage
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.runfolder import differences, of_this_version
from rcmstr_fast.tuning.record import processor

#: Records of which a fingerprint takes the bytes.
SAMPLED = 64


class Records(Protocol):
    """`data.source.ImageSource`, as far as a fingerprint needs it."""

    sizes: list[int]

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> list[bytes | None]:
        """Encoded images; None where one cannot be read."""


def fingerprint(source: Records) -> str:
    """What the data are recognised by, wherever they lie: the sizes of the roots and a sample of records.

    Args:
        source: read at `SAMPLED` places, evenly over all records, the first and the last one among them.
    Returns:
        32 hexadecimal digits.
    """
    made = hashlib.blake2b(" ".join(str(int(size)) for size in source.sizes).encode(), digest_size=16)
    places = np.unique(np.linspace(0, max(0, len(source) - 1), SAMPLED).round().astype(np.int64))
    for record in source.read(places[: len(source)]):
        made.update(b"-" if record is None else len(record).to_bytes(8, "little") + record)
    return made.hexdigest()


def same_everywhere(data: str | None, world: World) -> str | None:
    """The fingerprint, where all processes have the same.

    Raises:
        ConfigError: a process sees other data.
    """
    number = torch.tensor([int(data or "0", 16) % 2**62], device=world.device)
    others = [rank for rank, found in enumerate(world.gather(number).tolist()) if found != int(number)]
    if others:
        raise ConfigError(f"data.roots must hold the same images for every process, rank {others[0]} sees other ones")
    return data


def check_owner(path: Path, state: dict[str, Any], config: PretrainConfig, data: str | None) -> None:
    """Refuse a checkpoint of another run or over other data.

    Args:
        path: of the checkpoint, to be named.
        state: the checkpoint.
        config: of this run, resolved.
        data: fingerprint of this run's data; None: unknown.
    Raises:
        ConfigError: naming what differs.
    """
    if not isinstance(state.get("config"), dict):
        raise ConfigError(f"{path}: expected a checkpoint of this run, it does not say of which run it is")
    now, held = dataclasses.asdict(config), of_this_version(state["config"], config)
    changed = differences(held, now)
    if changed:
        raise ConfigError(
            f"{path}: belongs to a run with another configuration ({'; '.join(changed)}); restore these fields, or "
            "put the run's own checkpoint there"
        )
    known, roots = state.get("data"), [x["data"]["roots"] for x in (held, now)]
    if known and data and known != data:
        raise ConfigError(
            f"data.roots: {roots[1]} hold other images than {roots[0]}, over which the run began; "
            "restore the data or begin another run"
        )
    if not (known and data) and roots[0] != roots[1]:
        raise ConfigError(
            f"data.roots: {roots[0]} -> {roots[1]}, and {path} does not say by what the data would be recognised; "
            "restore the path"
        )


def facts(precision: str, total_steps: int, device: torch.device) -> dict[str, str]:
    """What decides on the numbers of a run besides its configuration and data, in words.

    Args:
        precision: in which it computes: fp32, bf16 or fp64.
        total_steps: its length.
        device: where it computes.
    """
    gpu = device.type == "cuda"
    able = {
        name: next((b for b, reasons in found.items() if not reasons), "none")
        for name, found in dispatch.availability().items()
    }
    elsewhere = ("RCMSTR_FAST_CACHE", "RCMSTR_FAST_TUNE", "RCMSTR_FAST_DEBUG")  # where and how a run finds its choices
    settings = {name: os.environ[name] for name in env.VARIABLES if os.environ.get(name) and name not in elsewhere}
    return {
        "precision": precision,
        "steps": str(total_steps),
        "processor": torch.cuda.get_device_name(device) if gpu else processor(),
        "torch": str(torch.__version__),
        "backends": " ".join(f"{name}:{backend}" for name, backend in sorted(able.items())),
        "tuning": "; ".join(storage.describe()),
        "variables": " ".join(f"{name}={value}" for name, value in sorted(settings.items())) or "none",
    }


def what_changed(before: Any, now: dict[str, str], *, cosine: bool) -> str | None:
    """One line about what is different from the part of the run that a checkpoint ends, or None.

    Args:
        before: `facts` of the checkpoint; anything else says nothing.
        now: `facts` of this process.
        cosine: the learning rate depends on the length of the run.
    """
    if not isinstance(before, dict):
        return None
    words = []
    for name, value in now.items():
        held = before.get(name, value)
        if held == value or (name == "steps" and not cosine):
            continue
        if name == "steps":
            words.append(f"the learning rate falls over {value} steps ({held} before)")
        elif name in ("backends", "tuning"):
            words.append(f"{name} differ")
        else:
            words.append(f"{name} {value} ({held} before)")
    if not words:
        return None
    return f"from here on the run is not what it was: {'; '.join(words)}"
