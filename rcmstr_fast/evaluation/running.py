"""What the evaluations share beside the training itself: whose run is in a folder, threads, kept frames."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation.config import FREE_FIELDS, TrainedConfig
from rcmstr_fast.evaluation.decoder_data import Feed
from rcmstr_fast.evaluation.over_encoder import OverEncoder, Precision
from rcmstr_fast.evaluation.probe_data import ProbeData
from rcmstr_fast.evaluation.reading import progress
from rcmstr_fast.evaluation.schedule import Schedule
from rcmstr_fast.train.distributed import World, joined, use_bf16
from rcmstr_fast.train.runfolder import RunFolder, differences

R = TypeVar("R")

_log = logging.getLogger(__name__)


def precision_of(config: TrainedConfig, world: World) -> Precision:
    """What a run computes in here."""
    if config.precision == "fp64":
        return "fp64"
    return "bf16" if use_bf16(config.precision, world.device) else "fp32"


def evaluate(
    config: TrainedConfig,
    fields: set[str],
    finished: Callable[[Path, str], R],
    run: Callable[[RunFolder, str, World], R],
    world: World | None = None,
) -> R:
    """Run an evaluation in its folder, or read back what a finished one found.

    Args:
        config: checked.
        fields: which only configurations of this kind of run have.
        finished: (results.json, digest of the encoder) -> the results.
        run: (folder, digest of the encoder, world) -> the results.
        world: the processes; None: those that torchrun started are joined.
    Raises:
        ConfigError: the folder holds something else, or another process has it.
    """
    if world is None:
        with joined(config.device) as entered:
            return evaluate(config, fields, finished, run, entered)
    here: World = world
    folder = RunFolder(config.run)
    with contextlib.ExitStack() as stack:
        here.on_rank0(lambda: stack.enter_context(folder.locked()))
        digest = digest_of(config.encoder)
        here.on_rank0(lambda: adopt(folder, config, fields))
        done = folder.path / "results.json"
        if here.on_rank0(done.is_file):
            return finished(done, digest)
        return run(folder, digest, here)


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch compute with so many threads while entered; 0: as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_frames(config: TrainedConfig, recogniser: OverEncoder, train: Feed, val: Feed, schedule: Schedule) -> None:
    """Compute frames that never change once, as far as the memory limit and the length of the run make sense."""
    if not recogniser.frozen or recogniser.bn == "batch":
        return
    recogniser.eval()
    left = config.cache_gib
    revisited = schedule.total_steps * schedule.batch_size >= len(train)
    for name, feed, wanted in (("training", train, config.augment == "none" and revisited), ("validation", val, True)):
        if wanted:
            show = functools.partial(progress, what=f"frames of {name} words")
            taken = feed.keep_frames(left, config.batch_size, show)
            left -= taken
            limit = f"computed each time, more than cache_gib={config.cache_gib}"
            _log.info("%s frames: %s", name, f"kept in memory, {taken:.2f} GiB" if taken else limit)


def digest_of(encoder: str) -> str:
    """SHA-256 of the encoder's file; empty for an untrained encoder or where there is no such file."""
    path = Path(encoder)
    path = path / "encoder.safetensors" if path.is_dir() else path
    if not encoder or not path.is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def adopt(folder: RunFolder, config: TrainedConfig, fields: set[str]) -> None:
    """Check that `config` may be run in the folder.

    That is: it is empty, or holds an evaluation with the same configuration, or one that never saved anything.

    Args:
        folder: of the run.
        config: of the run.
        fields: which only configurations of this kind of run have.
    Raises:
        ConfigError: naming every field that differs, or what else the folder holds.
    """
    if all(path.name.startswith(".") for path in folder.path.iterdir()):
        return
    try:
        held = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"run: {folder.path} is not empty and has no readable config.yaml; name another folder"
        ) from error
    if not isinstance(held, dict) or not fields <= held.keys():
        raise ConfigError(f"run: {folder.path} holds another kind of run; name another folder")
    changed = [d for d in differences(held, dataclasses.asdict(config)) if d.split(":")[0] not in FREE_FIELDS]
    if changed and folder.checkpoints.exists():
        raise ConfigError(
            f"run: {folder.path} holds a run with another configuration ({'; '.join(changed)}); "
            "name another folder or restore these fields"
        )


def identity_of(digest: str, data: ProbeData) -> str:
    """Digest of the encoder, the words and the form of the state: what a checkpoint depends on beyond its fields."""
    words = repr([(w.records.tolist(), w.labels) for w in (data.train, data.val)])
    return hashlib.sha256(f"2 {digest}{words}".encode()).hexdigest()


def words_of(data: ProbeData) -> dict[str, dict[str, Any]]:
    """Training and validation words: those kept and those left out by reason add up to the total."""
    kept = len(data.val) + sum(data.val_dropped.values())
    return {
        "training": {"total": data.total, "kept": len(data.train), "dropped": data.dropped},
        "validation": {"total": kept, "kept": len(data.val), "dropped": data.val_dropped},
    }
