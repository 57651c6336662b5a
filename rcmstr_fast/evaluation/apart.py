"""Training, validation and test words are different words, by place and by content, or the run says what overlaps."""

import logging
import os
from itertools import combinations, product

import numpy as np

from rcmstr_fast.config import ConfigError, as_list
from rcmstr_fast.data.overlap import NOTHING, content_hashes, find_overlap
from rcmstr_fast.data.source import open_sources
from rcmstr_fast.evaluation.config import TrainedConfig
from rcmstr_fast.evaluation.decoder_data import Words
from rcmstr_fast.train.export import read_export

#: Pretraining pictures that are looked through for test pictures, at most.
_MOST_PRETRAINING = 2_000_000

_log = logging.getLogger(__name__)


def check_contents(
    config: TrainedConfig, sets: dict[str, Words], tests: dict[str, Words], inside: dict[str, Words]
) -> None:
    """Refuse words that are both trained on and validated or tested on, or both validated and tested on.

    Args:
        config: `allow_overlap` turns the error into lines of the log.
        sets: training words and, where they have roots of their own, validation words.
        tests: test words by name.
        inside: validation words split off the training words.
    Raises:
        ConfigError: sets share a place or a picture.
    """
    if not config.allow_overlap:
        for a, b in combinations(sets, 2):
            _check_apart(a, sets[a], b, sets[b])
        for (a, words), (b, test) in product(sets.items(), tests.items()):
            _check_apart(a, words, b, test)
    every = sets | inside | tests
    pairs = [(a, b) for a, b in combinations(every, 2) if a not in tests and b not in inside]
    sources = {name: words.source for name, words in every.items()}
    report = find_overlap(sources, {name: words.records for name, words in every.items()}, between=pairs)
    if report.pairs and not config.allow_overlap:
        raise ConfigError(f"{report}; allow_overlap=true goes on all the same")
    for pair in report.pairs:
        _log.warning("%s", pair)
    if tests and (line := _seen_unlabelled(config, tests)):
        _log.warning("%s", line)


def _seen_unlabelled(config: TrainedConfig, tests: dict[str, Words]) -> str:
    """What to say of test pictures among those of the pretraining, which saw them without labels; empty: nothing."""
    if config.encoder in ("", "random"):
        return ""
    roots = as_list(read_export(config.encoder)[1]["config"].get("data", {}).get("roots", []))
    try:
        source = open_sources(roots) if roots else None
    except ConfigError:
        where = ", ".join(roots)
        return f"the pretraining pictures ({where}) are not at hand; whether test pictures were among them is unknown"
    if source is None:
        return ""
    if len(source) > _MOST_PRETRAINING:
        return f"whether test pictures are among the {len(source)} of the pretraining was not looked at"
    name = "the pretraining (without labels)"
    report = find_overlap(
        {name: source} | {test: words.source for test, words in tests.items()},
        {test: words.records for test, words in tests.items()},
        between=[(name, test) for test in tests],
    )
    return str(report)


def without_copies(train: Words, val: Words) -> tuple[Words, int]:
    """The training words without those whose picture is that of a validation word, and how many these were.

    Raises:
        ConfigError: nothing is left.
    """
    held = content_hashes(val.source, val.records)
    copies = np.isin(content_hashes(train.source, train.records), held[held != NOTHING])
    if copies.all():
        raise ConfigError("train: every word left for training has the picture of a validation word")
    return train.take(np.flatnonzero(~copies)), int(copies.sum())


def _check_apart(one: str, a: Words, other: str, b: Words) -> None:
    """Raise ConfigError where two sets share a database, a folder, or one lies within the other."""
    paths = [[os.path.realpath(found.path) for found in words.source.sets] for words in (a, b)]
    for x in paths[0]:
        for y in paths[1]:
            if os.path.commonpath([x, y]) in (x, y):
                raise ConfigError(f"{one} and {other} must be different words, both hold {max(x, y, key=len)}")
