"""Test sets: read once, compared under each protocol, written down."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.table import to_tsv
from rcmstr_fast.evaluation.advice import emptied, emptied_warning
from rcmstr_fast.evaluation.config import ProbeConfig
from rcmstr_fast.evaluation.decoder_data import Feed
from rcmstr_fast.evaluation.metrics import score
from rcmstr_fast.evaluation.pictures import Reading, contact_sheet
from rcmstr_fast.evaluation.protocols import Protocol
from rcmstr_fast.evaluation.reading import read_words
from rcmstr_fast.evaluation.recogniser import Recogniser
from rcmstr_fast.evaluation.report import RunResult, SetResult, full_table, to_csv, to_json
from rcmstr_fast.train.checkpoint import write_text
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.runfolder import RunFolder

_SHOWN = 12

_log = logging.getLogger(__name__)


def parse_test_sets(entries: Sequence[str]) -> dict[str, str]:
    """`name=folder` entries (or folders, named by their last part) to name -> folder.

    Raises:
        ConfigError: a name is empty, holds a slash, or comes twice.
    """
    tests: dict[str, str] = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not equals or Path(entry).exists():
            name, path = Path(entry).absolute().name, entry
        if not name or not path or "/" in name or name.startswith("."):
            raise ConfigError(f"test must be name=folder with a name that can be a file name, got {entry!r}")
        if name in tests:
            raise ConfigError(f"test sets must have different names, got {name} twice")
        tests[name] = path
    return tests


def test_set(
    name: str,
    feed: Feed,
    recogniser: Recogniser,
    protocols: list[Protocol],
    config: ProbeConfig,
    folder: RunFolder,
    world: World,
) -> tuple[list[SetResult], list[Reading]]:
    """Read one test set, compare it under every protocol, and write predictions/NAME.tsv.

    Args:
        name: of the set.
        feed: its words, labelled as stored.
        recogniser: the trained model.
        protocols: the first one decides the `correct` column of the predictions.
        config: of the run.
        folder: the run folder.
        world: the processes, each of which reads a share; the first one writes.
    Returns:
        A result for each protocol, and a few words with what was read, for the picture.
    Raises:
        ConfigError: no word of the set counts under a protocol.
    """
    texts, confidences, broken = read_words(recogniser, feed, config.batch_size, name, world)
    results, rows = [], []
    for protocol in protocols:
        targets = [protocol.target(label) for label in feed.labels]
        kept = [i for i, (_, reason) in enumerate(targets) if reason is None]
        dropped = dict(Counter(reason for _, reason in targets if reason))
        if not kept:
            raise ConfigError(f"test {name}: no word counts under {protocol.name}: {dropped}")
        if warning := emptied_warning(f"test {name}", protocol, feed.labels):
            _log.warning("%s", warning)
        labels = [targets[i][0] for i in kept]
        read = [protocol.normalise(texts[i]) for i in kept]
        unread = {at for at, i in enumerate(kept) if i in broken}
        beyond = [label for label in labels if recogniser.beyond_ctc(label)]
        results.append(
            SetResult(
                name,
                protocol.name,
                len(feed),
                dropped,
                score(labels, read, unread),
                emptied=sum(emptied(protocol, feed.labels[i]) for i in kept),
                broken=len(unread),
                unreadable=sum(bool(recogniser.charset.missing(label)) for label in labels),
                beyond_ctc=len(beyond),
            )
        )
        if protocol is protocols[0]:
            first = dict(zip(kept, zip(labels, read)))
            _note(name, results[-1], beyond)
    for i, (label, text, confidence) in enumerate(zip(feed.labels, texts, confidences)):
        verdict = int(first[i][0] == first[i][1] and i not in broken) if i in first else ""
        rows.append([feed.images.words.name(i), label, text, f"{confidence:.4f}", verdict])
    path = folder.path / "predictions" / f"{name}.tsv"
    world.on_rank0(lambda: write_predictions(path, rows))
    return results, _some_readings(feed, first, confidences) if world.rank == 0 else []


def _note(name: str, result: SetResult, beyond: Sequence[str]) -> None:
    """Say what of a test set can only be misread."""
    if result.unreadable:
        _log.warning("test %s: %d words have characters outside the charset", name, result.unreadable)
    if result.broken:
        _log.warning("test %s: %d broken pictures count as misread", name, result.broken)
    if beyond:
        named = ", ".join(map(repr, beyond[:5])) + (", ..." if len(beyond) > 5 else "")
        _log.warning(
            "test %s: %d words need more frames than CTC has here, and are misread: %s", name, len(beyond), named
        )


def _some_readings(feed: Feed, first: dict[int, tuple[str, str]], confidences: list[float]) -> list[Reading]:
    """About as many right as wrong words of a set, spread over it."""
    chosen: list[int] = []
    for right in (True, False):
        group = [i for i, (label, text) in first.items() if (label == text) == right]
        chosen += group[:: max(1, len(group) // (_SHOWN // 2))][: _SHOWN // 2]
    images = feed.images.get(np.array(chosen))
    return [Reading(image, *first[i], confidences[i]) for image, i in zip(images, chosen)]


def write_predictions(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """A table (`data.table.to_tsv`) of name, label, prediction, confidence, correct.

    `correct` is 1, 0, or empty where the word does not count. Bytes of names that are not UTF-8 stay as they are.
    """
    text = to_tsv([["name", "label", "prediction", "confidence", "correct"], *rows])
    path.parent.mkdir(exist_ok=True)
    write_text(path, text, "surrogateescape")


def write_results(folder: Path, result: RunResult, readings: Sequence[Reading]) -> None:
    """predictions.png, table.md, results.csv and, last, results.json, which marks the run as finished."""
    if readings:
        contact_sheet(readings[: 4 * _SHOWN]).save(folder / "predictions.png")
    texts = {"table.md": full_table(result) + "\n", "results.csv": to_csv([result]), "results.json": to_json(result)}
    for name, text in texts.items():
        write_text(folder / name, text)
