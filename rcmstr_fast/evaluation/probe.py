"""Decoder evaluation: a decoder over a frozen, fine-tuned or untrained encoder, trained, tested and reported."""

import contextlib
import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import rcmstr_fast
from rcmstr_fast import env
from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation.assemble import build_recogniser, open_data, rotation
from rcmstr_fast.evaluation.config import ProbeConfig, check
from rcmstr_fast.evaluation.decoder_data import Feed, WordImages, Words, estimate_statistics
from rcmstr_fast.evaluation.fit import Fit
from rcmstr_fast.evaluation.metrics import score
from rcmstr_fast.evaluation.pictures import Reading
from rcmstr_fast.evaluation.probe_data import ProbeData
from rcmstr_fast.evaluation.protocols import Protocol, get_protocol
from rcmstr_fast.evaluation.reading import read_words
from rcmstr_fast.evaluation.recogniser import Recogniser
from rcmstr_fast.evaluation.report import RunResult, full_table, load_result
from rcmstr_fast.evaluation.running import evaluate, identity_of, keep_frames, precision_of, threads, words_of
from rcmstr_fast.evaluation.schedule import Order, Schedule
from rcmstr_fast.evaluation.testing import parse_test_sets, test_set, write_results
from rcmstr_fast.models.batch_norm import set_bn_groups
from rcmstr_fast.train.checkpoint import write_whole
from rcmstr_fast.train.commit import commit
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.environment import session
from rcmstr_fast.train.log import RunLog
from rcmstr_fast.train.runfolder import RunFolder

__all__ = ["ProbeConfig", "probe"]

#: Fields that only a probe's configuration has.
_FIELDS = {"decoder", "protocols"}

_log = logging.getLogger(__name__)


def probe(config: ProbeConfig, world: World | None = None) -> RunResult:
    """Train the decoder (and, by mode, the encoder), read the test sets once with the best validation's weights.

    An interrupted run is continued, of a finished one the results are read back.

    Args:
        config: of `rcmstr probe` or `rcmstr finetune`.
        world: the processes, which work on each step together; None: those that torchrun started are joined.
    Returns:
        The results, as in results.json of the run folder.
    Raises:
        ConfigError: a wrong value, missing or unusable files or data.
        RunError: a signal, a full disk, or a loss that is not finite.
    """
    check(config)
    protocols = [get_protocol(name) for name in dict.fromkeys(config.protocols)]
    tests = parse_test_sets(config.test)
    return evaluate(
        config,
        _FIELDS,
        lambda path, digest: _finished(path, config, digest),
        lambda folder, digest, here: _run(config, folder, protocols, tests, digest, here),
        world,
    )


def _run(
    config: ProbeConfig,
    folder: RunFolder,
    protocols: list[Protocol],
    tests: dict[str, str],
    digest: str,
    world: World,
) -> RunResult:
    precision = precision_of(config, world)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(RunLog(folder, world)))
        charset = Charset.load(config.charset)
        recogniser = build_recogniser(config, charset, precision)
        recogniser.move(world.device)
        set_bn_groups(recogniser, config.bn_group_size)
        data = open_data(config, protocols[0], charset, tests, recogniser.ctc_frames)
        pool = stack.enter_context(ThreadPoolExecutor(config.workers or env.threads()))
        recogniser.rotate = rotation(config)

        def feed(words: Words, preset: str, limit_gib: float) -> Feed:
            images = WordImages(words, recogniser.size, pool, limit_gib, recogniser.rotate)
            return Feed(recogniser, images, world, preset=preset, seed=config.seed)

        train = feed(data.train, config.augment, config.cache_gib)
        val = feed(data.val, "none", config.cache_gib)
        schedule = Schedule.make(config, len(train), world.world_size)
        order = Order(schedule, data.train.root_sizes(), config.train_weights, config.seed)
        torch.manual_seed(config.seed + world.rank)  # dropout differs between processes
        fit = Fit(recogniser, config, schedule, order, world, folder, identity_of(digest, data))
        fit.restore()
        _announce(config, recogniser, data, schedule, fit)
        # Whatever cannot be has been refused by now, and nothing has been written.
        world.on_rank0(lambda: folder.write_description(config, session(world.world_size)))
        log.open()
        listing = data.listing(config).encode()
        world.on_rank0(lambda: write_whole(folder.path / "words.json", lambda file: file.write(listing)))
        if config.encoder == "random" and config.mode == "frozen" and config.bn == "running":
            used = estimate_statistics(recogniser, train, config.batch_size)
            _log.info("untrained encoder: batch-norm statistics estimated on %d training words", used)
        keep_frames(config, recogniser, train, val, schedule)
        with threads(config.decoder_threads):
            fit.run(train, lambda: _validated(recogniser, val, protocols[0], config.batch_size, world), log)
        fit.load_best()
        info = _info(config, recogniser, data, schedule, fit, digest)
        sets, readings = [], []
        for name, words in data.tests.items():
            results, some = test_set(name, feed(words, "none", 0.0), recogniser, protocols, config, folder, world)
            sets += results
            readings += some
        result = RunResult(config.title or folder.path.absolute().name, sets, info)
        world.on_rank0(lambda: _write(folder, recogniser, result, readings))
        _log.info("results\n%s", full_table(result), extra={"file_only": True})
    return result


def _validated(
    recogniser: Recogniser, val: Feed, protocol: Protocol, batch_size: int, world: World
) -> dict[str, float]:
    """Accuracy, 1-NED and CER over the validation words."""
    read = read_words(recogniser, val, batch_size, "validation", world)
    found = score(val.labels, [protocol.normalise(text) for text in read.texts], read.broken)
    return {"accuracy": found.accuracy, "ned": found.ned, "cer": found.cer}


def _write(folder: RunFolder, recogniser: Recogniser, result: RunResult, readings: list[Reading]) -> None:
    recogniser.save(folder.path / "recogniser.safetensors", result.info)
    write_results(folder.path, result, readings)


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
        config.mode,
        config.encoder or "random",
        recogniser.decoder_name,
        recogniser.memory,
        len(recogniser.charset),
        trained,
        recogniser.precision,
    )
    _log.info("words: train %d, validation %d, test %s", len(data.train), len(data.val), sizes)
    _log.info(
        "%d steps of %d words in %d processes x %d, validation every %d%s",
        schedule.total_steps,
        schedule.batch_size,
        fit.world.world_size,
        config.accumulate,
        schedule.eval_every,
        f"; continued at step {fit.step}" if fit.step else "",
    )
    unseen = len(set(recogniser.charset.characters) - set("".join(data.train.labels)))
    if unseen:
        _log.info("%d characters of the charset do not occur in the training labels", unseen)


def _info(
    config: ProbeConfig, recogniser: Recogniser, data: ProbeData, schedule: Schedule, fit: Fit, digest: str
) -> dict[str, Any]:
    """Facts kept beside the results and in the recogniser's file."""
    best = fit.best
    assert best is not None  # the last step validates
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
        "words": words_of(data),
        "val_words": len(data.val),
        "steps": schedule.total_steps,
        "batch_size": schedule.batch_size,
        "best_step": best["step"],
        "val_accuracy": best["accuracy"],
        "version": rcmstr_fast.__version__,
        "commit": commit(),
    }
