"""Decoder evaluation: a decoder over a frozen, fine-tuned or untrained encoder, trained, tested and reported."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

import rcmstr_fast
from rcmstr_fast import env
from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.charset import Charset
from rcmstr_fast.evaluation.assemble import ProbeData, build_recogniser, open_data, rotation
from rcmstr_fast.evaluation.config import FREE_FIELDS, ProbeConfig, check
from rcmstr_fast.evaluation.decoder_data import Feed, WordImages, Words, estimate_statistics
from rcmstr_fast.evaluation.fit import Fit, Schedule, progress
from rcmstr_fast.evaluation.protocols import Protocol, get_protocol
from rcmstr_fast.evaluation.recogniser import Precision, Recogniser
from rcmstr_fast.evaluation.report import RunResult, load_result, table
from rcmstr_fast.evaluation.testing import parse_test_sets, test_set, write_results
from rcmstr_fast.train.checkpoint import write_whole
from rcmstr_fast.train.distributed import World, choose_device, use_bf16
from rcmstr_fast.train.environment import commit
from rcmstr_fast.train.log import RunLog
from rcmstr_fast.train.runfolder import RunFolder, differences

__all__ = ["ProbeConfig", "probe"]

_log = logging.getLogger(__name__)


def probe(config: ProbeConfig) -> RunResult:
    """Train the decoder (and, by mode, the encoder), read the test sets once with the best validation's weights.

    An interrupted run is continued, of a finished one the results are read back.

    Args:
        config: of `rcmstr probe` or `rcmstr finetune`.
    Returns:
        The results, as in results.json of the run folder.
    Raises:
        ConfigError: a wrong value, missing or unusable files or data.
        RunError: a signal, a full disk, or a loss that is not finite.
    """
    check(config)
    protocols = [get_protocol(name) for name in dict.fromkeys(config.protocols)]
    tests = parse_test_sets(config.test)
    folder = RunFolder(config.run)
    with folder.locked():
        digest = _digest(config.encoder)
        _adopt(folder, config)
        done = folder.path / "results.json"
        if done.is_file():
            return _finished(done, config, digest)
        return _run(config, folder, protocols, tests, digest)


def _run(
    config: ProbeConfig, folder: RunFolder, protocols: list[Protocol], tests: dict[str, str], digest: str
) -> RunResult:
    world = World(choose_device(config.device, 0))
    precision: Precision = "bf16" if use_bf16(config.precision, world.device) else "fp32"
    with contextlib.ExitStack() as stack:
        folder.write_description(config, 1)
        log = stack.enter_context(contextlib.closing(RunLog(folder, world)))
        charset = Charset.load(config.charset)
        recogniser = build_recogniser(config, charset, precision).to(world.device, memory_format=torch.channels_last)
        data = open_data(config, protocols[0], charset, tests)
        pool = stack.enter_context(ThreadPoolExecutor(config.workers or env.threads()))
        recogniser.rotate = rotation(config)

        def feed(words: Words, preset: str, limit_gib: float) -> Feed:
            images = WordImages(words, recogniser.size, pool, limit_gib, recogniser.rotate)
            return Feed(recogniser, images, world.device, preset=preset, seed=config.seed)

        train = feed(data.train, config.augment, config.cache_gib)
        val = feed(data.val, "none", config.cache_gib)
        schedule = Schedule.make(config, len(train))
        torch.manual_seed(config.seed)
        fit = Fit(recogniser, config, schedule, world, folder, _identity(digest, data))
        fit.restore()
        _announce(config, recogniser, data, schedule, fit)
        write_whole(folder.path / "words.json", lambda file: file.write(data.listing(config).encode()))
        if config.encoder == "random" and config.mode == "frozen" and config.bn == "running":
            used = estimate_statistics(recogniser, train, config.batch_size)
            _log.info("untrained encoder: batch-norm statistics estimated on %d training words", used)
        _keep_frames(config, recogniser, train, val, schedule)
        with _threads(config.decoder_threads):
            fit.run(train, val, protocols[0], log)
        fit.load_best()
        info = _info(config, recogniser, data, schedule, fit, digest)
        sets, readings = [], []
        for name, words in data.tests.items():
            results, some = test_set(name, feed(words, "none", 0.0), recogniser, protocols, config, folder)
            sets += results
            readings += some
        result = RunResult(config.title or folder.path.absolute().name, sets, info)
        recogniser.save(folder.path / "recogniser.safetensors", info)
        write_results(folder.path, result, readings)
        _log.info("results\n%s", table(result), extra={"file_only": True})
    return result


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch compute with so many threads while entered; 0: as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep_frames(config: ProbeConfig, recogniser: Recogniser, train: Feed, val: Feed, schedule: Schedule) -> None:
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


def _digest(encoder: str) -> str:
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


def _identity(digest: str, data: ProbeData) -> str:
    """Digest of the encoder and of the words: what a checkpoint depends on beyond the configuration."""
    words = repr([(w.records.tolist(), w.labels) for w in (data.train, data.val)])
    return hashlib.sha256((digest + words).encode()).hexdigest()


def _adopt(folder: RunFolder, config: ProbeConfig) -> None:
    """Check that `config` may be run in the folder.

    That is: it is empty, or holds a probe with the same configuration, or one that never saved anything.

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
    if not isinstance(held, dict) or not {"decoder", "protocols"} <= held.keys():
        raise ConfigError(f"run: {folder.path} holds another kind of run; name another folder")
    changed = [d for d in differences(held, dataclasses.asdict(config)) if d.split(":")[0] not in FREE_FIELDS]
    if changed and folder.checkpoints.exists():
        raise ConfigError(
            f"run: {folder.path} holds a run with another configuration ({'; '.join(changed)}); "
            "name another folder or restore these fields"
        )


def _finished(path: Path, config: ProbeConfig, digest: str) -> RunResult:
    """Results of a finished run, whose encoder must be the one found now."""
    result = load_result(path)
    if digest and digest != result.info.get("encoder_digest"):
        raise ConfigError(f"run: {path.parent} evaluated another state of {config.encoder}; name another folder")
    return dataclasses.replace(result, model=config.title or result.model)


def _announce(config: ProbeConfig, recogniser: Recogniser, data: ProbeData, schedule: Schedule, fit: Fit) -> None:
    trained = sum(p.numel() for p in fit.parameters)
    sizes = ", ".join(f"{name} {len(words)}" for name, words in data.tests.items())
    _log.info(
        "%s, encoder %s, decoder %s over %s, %d characters, %d trained parameters, %s",
        config.mode, config.encoder or "random", recogniser.decoder_name, recogniser.memory, len(recogniser.charset),
        trained, recogniser.precision,
    )  # fmt: skip
    _log.info("words: train %d, validation %d, test %s", len(data.train), len(data.val), sizes)
    _log.info(
        "%d steps of %d words, validation every %d%s", schedule.total_steps, schedule.batch_size, schedule.eval_every,
        f"; continued at step {fit.step}" if fit.step else "",
    )  # fmt: skip
    unseen = len(set(recogniser.charset.characters) - set("".join(data.train.labels)))
    if unseen:
        _log.info("%d characters of the charset do not occur in the training labels", unseen)


def _info(
    config: ProbeConfig, recogniser: Recogniser, data: ProbeData, schedule: Schedule, fit: Fit, digest: str
) -> dict[str, Any]:
    """Facts kept beside the results and in the recogniser's file."""
    return {
        "mode": config.mode,
        "encoder": config.encoder or "random",
        "encoder_digest": digest,
        "arch": recogniser.model.encoder,
        "decoder": recogniser.decoder_name,
        "memory": recogniser.memory,
        "precision": recogniser.precision,
        "characters": len(recogniser.charset),
        "protocol": config.protocols[0],
        "seed": config.seed,
        "subset": config.subset,
        "train_words": len(data.train),
        "train_dropped": data.dropped,
        "val_words": len(data.val),
        "steps": schedule.total_steps,
        "batch_size": schedule.batch_size,
        "best_step": fit.best["step"],
        "val_accuracy": fit.best["accuracy"],
        "version": rcmstr_fast.__version__,
        "commit": commit(),
    }
