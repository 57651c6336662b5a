"""What the evaluations share: a run in its folder, from the untrained network to the one with the best weights."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import yaml

from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation.config import FREE_FIELDS, TrainedConfig
from rcmstr_fast.evaluation.decoder_data import Feed, Words, estimate_statistics
from rcmstr_fast.evaluation.fit import Fit
from rcmstr_fast.evaluation.over_encoder import OverEncoder, Precision
from rcmstr_fast.evaluation.probe_data import ProbeData
from rcmstr_fast.evaluation.reading import progress
from rcmstr_fast.evaluation.report import RunResult
from rcmstr_fast.evaluation.schedule import Order, Schedule
from rcmstr_fast.evaluation.segment_report import SegmentResult
from rcmstr_fast.models.batch_norm import set_bn_groups
from rcmstr_fast.train.checkpoint import write_whole
from rcmstr_fast.train.distributed import World, joined, use_bf16
from rcmstr_fast.train.environment import session
from rcmstr_fast.train.log import RunLog
from rcmstr_fast.train.runfolder import RunFolder, differences

C = TypeVar("C", bound=TrainedConfig)
F = TypeVar("F", bound=Feed)
R = TypeVar("R", RunResult, SegmentResult)

_log = logging.getLogger(__name__)


def evaluate(
    config: C,
    fields: set[str],
    load: Callable[[Path], R],
    run: Callable[["Run[C]", RunLog], R],
    world: World | None = None,
) -> R:
    """Run an evaluation in its folder, or read back what a finished one found.

    Args:
        config: checked.
        fields: which only configurations of this kind of run have.
        load: reads results.json.
        run: makes the results.
        world: the processes; None: those that torchrun started are joined.
    Raises:
        ConfigError: the folder holds something else, another process has it, or it was made with another encoder.
    """
    if world is None:
        with joined(config.device) as entered:
            return evaluate(config, fields, load, run, entered)
    here: World = world
    folder = RunFolder(config.run)
    with contextlib.ExitStack() as stack:
        here.on_rank0(lambda: stack.enter_context(folder.locked()))
        this = Run(config, folder, digest_of(config.encoder), here)
        here.on_rank0(lambda: adopt(folder, config, fields))
        done = folder.path / "results.json"
        if here.on_rank0(done.is_file):
            return this.found(load(done))
        return run(this, stack.enter_context(contextlib.closing(RunLog(folder, here))))


@dataclasses.dataclass(frozen=True)
class Run(Generic[C]):
    """An evaluation in its folder.

    Attributes:
        config: checked.
        folder: claimed for it.
        digest: of the encoder's file, see `digest_of`.
        world: this process.
    """

    config: C
    folder: RunFolder
    digest: str
    world: World

    @property
    def precision(self) -> Precision:
        """What it computes in here."""
        if self.config.precision == "fp64":
            return "fp64"
        return "bf16" if use_bf16(self.config.precision, self.world.device) else "fp32"

    @property
    def title(self) -> str:
        """The name of what is evaluated, for tables."""
        return self.config.title or self.folder.path.absolute().name

    def found(self, result: R) -> R:
        """The results of a finished run, whose encoder must be the one found now, under the title asked for now."""
        if self.digest and self.digest != result.info.get("encoder_digest"):
            raise ConfigError(
                f"run: {self.folder.path} evaluated another state of {self.config.encoder}; name another folder"
            )
        return dataclasses.replace(result, model=self.config.title or result.model)

    def train(
        self,
        network: OverEncoder,
        data: ProbeData,
        feed: Callable[[Words, str, float], F],
        validate: Callable[[F], dict[str, float]],
        log: RunLog,
        lines: Sequence[str],
    ) -> Fit:
        """Train what stands on the encoder, and the encoder by mode; leaves the network with its best weights.

        Nothing is written before data, network and checkpoint have been accepted.

        Args:
            network: untrained.
            data: the words.
            feed: words, name of the augmentation and memory limit in GiB -> what the network is fed with.
            validate: figures of the validation words, by name.
            log: of the run; opened here.
            lines: about the run, for the log.
        """
        config, folder, world = self.config, self.folder, self.world
        network.move(world.device)
        set_bn_groups(network, config.bn_group_size)
        train, val = feed(data.train, config.augment, config.cache_gib), feed(data.val, "none", config.cache_gib)
        schedule = Schedule.make(config, len(train), world.world_size)
        order = Order(schedule, data.train.root_sizes(), config.train_weights, config.seed)
        torch.manual_seed(config.seed + world.rank)  # dropout differs between processes
        fit = Fit(network, config, schedule, order, world, folder, identity_of(self.digest, data))
        fit.restore()
        for line in (*lines, *_announced(fit, data)):
            _log.info("%s", line)
        world.on_rank0(lambda: folder.write_description(config, session(world.world_size)))
        log.open()
        listing = data.listing(config).encode()
        world.on_rank0(lambda: write_whole(folder.path / "words.json", lambda file: file.write(listing)))
        if config.encoder == "random" and network.frozen and network.bn == "running":
            used = estimate_statistics(network, train, config.batch_size)
            _log.info("untrained encoder: batch-norm statistics estimated on %d training pictures", used)
        keep_frames(config, network, train, val, schedule)
        with threads(config.decoder_threads):
            fit.run(train, lambda: validate(val), log)
        fit.load_best()
        return fit


def _announced(fit: Fit, data: ProbeData) -> list[str]:
    """What the log says of a run before its first step."""
    config, schedule = fit.config, fit.schedule
    sizes = ", ".join(f"{name} {len(words)}" for name, words in data.tests.items())
    begins = f"; continued at step {fit.step}" if fit.step else ""
    return [
        f"{config.mode}, encoder {config.encoder or 'random'}, {sum(p.numel() for p in fit.parameters)} trained "
        f"parameters, {fit.recogniser.precision}",
        f"pictures: train {len(data.train)}, validation {len(data.val)}, test {sizes}",
        f"{schedule.total_steps} steps of {schedule.batch_size} pictures in {fit.world.world_size} processes x "
        f"{config.accumulate}, validation every {schedule.eval_every}{begins}",
    ]


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
