"""Confidences that mean what they say: one temperature, fitted on validation words (Guo et al., ICML 2017)."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.source import open_sources
from rcmstr_fast.evaluation.decoder_data import WordImages, Words, open_words
from rcmstr_fast.evaluation.protocols import Protocol, get_protocol
from rcmstr_fast.exchange.reading import Reader, Scores, confidences, words_of

#: Most words that a temperature is fitted on.
MOST = 5_000
_BATCH = 256
_BINS = 10


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature.

    Attributes:
        temperature: logits are divided by it.
        words: words it was fitted on.
        source: where they were.
        error_before: expected calibration error at temperature 1, in [0, 1].
        error_after: the same at `temperature`.
    """

    temperature: float
    words: int
    source: str
    error_before: float
    error_after: float

    def describe(self) -> str:
        """One sentence."""
        return (
            f"Confidences are calibrated: temperature {self.temperature:.3g}, fitted on {self.words} validation words "
            f"({self.source}); expected calibration error there {self.error_before:.3f} before, {self.error_after:.3f} "
            "after."
        )


def validation_words(run: str | Path, named: Sequence[str]) -> tuple[Words, str]:
    """The words to calibrate on.

    Args:
        run: run folder of the recogniser, or its file.
        named: LMDB or image folders; `val`: the validation words of the run itself (its words.json).
    Returns:
        The words and where they are.
    Raises:
        ConfigError: there are none.
    """
    if list(named) != ["val"]:
        return open_words(named, "calibrate"), ", ".join(named)
    path = Path(run)
    listing = (path if path.is_dir() else path.parent) / "words.json"
    try:
        found = json.loads(listing.read_text(encoding="utf-8"))["val"]
        source, records = open_sources(found["roots"]), np.array(found["records"], dtype=np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"calibrate=val needs the words.json of the run beside the recogniser: {error}") from error
    labels = source.labels(records)
    kept = [i for i, label in enumerate(labels) if label is not None]
    return Words(source, records[kept], [labels[i] or "" for i in kept]), f"the run's own, {', '.join(found['roots'])}"


def calibrate(reader: Reader, words: Words, source: str) -> Calibration:
    """Fit the reader's temperature: the one with the least log loss of confidence against being right.

    Args:
        reader: its temperature is set.
        words: labelled; the first 5,000 of them are read.
        source: where they are, for the record.
    Raises:
        ConfigError: fewer than ten words that count.
    """
    protocol = _protocol_of(reader)
    words = words.take(range(min(len(words), MOST)))
    scores, right = _read_all(reader, words, protocol)
    if len(right) < 10:
        raise ConfigError(f"calibrate needs ten words or more that the recogniser could read, got {len(right)}")
    ctc = reader.recogniser.decoder.num_special == 1
    grid = torch.linspace(-3, 3, 121).exp().tolist()
    losses = [_log_loss(_whole(scores, ctc, t), right) for t in grid]
    reader.temperature = grid[int(np.argmin(losses))]
    before, after = (_error(_whole(scores, ctc, t), right) for t in (1.0, reader.temperature))
    return Calibration(reader.temperature, len(right), source, before, after)


def _protocol_of(reader: Reader) -> Protocol:
    """The run's first protocol, by which its labels were normalised."""
    return get_protocol(reader.facts.get("protocol", "exact"))


def _read_all(reader: Reader, words: Words, protocol: Protocol) -> tuple[list[Scores], Tensor]:
    """Scores of every sound picture whose label counts, and whether it was read right."""
    kept = [i for i, label in enumerate(words.labels) if protocol.target(label)[1] is None]
    words, scores, right = words.take(kept), [], []
    with ThreadPoolExecutor(env.threads()) as pool:
        images = WordImages(words, reader.size, pool, 0.0)
        for first in range(0, len(words), _BATCH):
            positions = np.arange(first, min(first + _BATCH, len(words)))
            pixels = images.get(positions)
            good = [i for i, position in enumerate(positions.tolist()) if position not in images.broken]
            if not good:
                continue
            found = reader.scores(pixels[good])
            scores.append(Scores(found.logits.cpu(), found.ids.cpu()))
            for i, reading in zip(good, words_of(scores[-1], reader.recogniser, 1.0)):
                target = protocol.target(words.labels[first + i])[0]
                right.append(float(protocol.normalise(reading.text) == target))
    return scores, torch.tensor(right)


def _whole(scores: list[Scores], ctc: bool, temperature: float) -> Tensor:
    return torch.cat([confidences(batch, ctc, temperature)[0] for batch in scores])


def _log_loss(confidence: Tensor, right: Tensor) -> float:
    return float(torch.nn.functional.binary_cross_entropy(confidence.clamp(1e-6, 1 - 1e-6), right))


def _error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy in ten bins, weighted by their words."""
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    gaps = [abs(float((confidence - right)[bins == i].sum())) for i in range(_BINS)]
    return sum(gaps) / len(right)
