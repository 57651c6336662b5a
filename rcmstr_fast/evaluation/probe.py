"""Decoder evaluation: a decoder over a frozen, fine-tuned or untrained encoder, trained, tested and reported."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import rcmstr_fast
from rcmstr_fast import env
from rcmstr_fast.charset import Charset
from rcmstr_fast.evaluation.assemble import build_recogniser, open_data, rotation
from rcmstr_fast.evaluation.config import ProbeConfig, check
from rcmstr_fast.evaluation.decoder_data import Feed, WordImages, Words
from rcmstr_fast.evaluation.fit import Fit
from rcmstr_fast.evaluation.metrics import score
from rcmstr_fast.evaluation.pictures import Reading
from rcmstr_fast.evaluation.probe_data import ProbeData
from rcmstr_fast.evaluation.protocols import Protocol, get_protocol
from rcmstr_fast.evaluation.reading import read_words
from rcmstr_fast.evaluation.recogniser import Recogniser
from rcmstr_fast.evaluation.report import RunResult, full_table, load_result
from rcmstr_fast.evaluation.running import Run, evaluate, words_of
from rcmstr_fast.evaluation.testing import parse_test_sets, test_set, write_results
from rcmstr_fast.train.commit import commit
from rcmstr_fast.train.distributed import World
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
    return evaluate(config, _FIELDS, load_result, lambda run, log: _run(run, log, protocols, tests), world)


def _run(run: Run[ProbeConfig], log: RunLog, protocols: list[Protocol], tests: dict[str, str]) -> RunResult:
    config, folder, world = run.config, run.folder, run.world
    charset = Charset.load(config.charset)
    recogniser = build_recogniser(config, charset, run.precision)
    data = open_data(config, protocols[0], charset, tests, recogniser.ctc_frames)
    recogniser.rotate = rotation(config)
    with ThreadPoolExecutor(config.workers or env.threads()) as pool:

        def feed(words: Words, preset: str, limit_gib: float) -> Feed:
            images = WordImages(words, recogniser.size, pool, limit_gib, recogniser.rotate)
            return Feed(recogniser, images, world, preset=preset, seed=config.seed)

        fit = run.train(
            recogniser,
            data,
            feed,
            lambda val: _validated(recogniser, val, protocols[0], config.batch_size, world),
            log,
            _described(recogniser, data),
        )
        sets, readings = [], []
        for name, words in data.tests.items():
            results, some = test_set(name, feed(words, "none", 0.0), recogniser, protocols, config, folder, world)
            sets += results
            readings += some
    result = RunResult(run.title, sets, _info(run, recogniser, data, fit))
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


def _described(recogniser: Recogniser, data: ProbeData) -> list[str]:
    """What the log says of the decoder."""
    characters, used = recogniser.charset.characters, set("".join(data.train.labels))
    lines = [f"decoder {recogniser.decoder_name} over {recogniser.memory}, {len(characters)} characters"]
    if unseen := len(set(characters) - used):
        lines.append(f"{unseen} characters of the charset do not occur in the training labels")
    return lines


def _info(run: Run[ProbeConfig], recogniser: Recogniser, data: ProbeData, fit: Fit) -> dict[str, Any]:
    """Facts kept beside the results and in the recogniser's file."""
    config, best, schedule = run.config, fit.best, fit.schedule
    assert best is not None  # the last step validates
    return {
        "mode": config.mode,
        "encoder": config.encoder or "random",
        "encoder_digest": run.digest,
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
