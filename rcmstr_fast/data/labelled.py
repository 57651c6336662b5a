"""Labelled records for decoders: which are kept, why the others are not, and seeded subsets."""

from collections import Counter
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from rcmstr_fast import random
from rcmstr_fast.charset import MAX_LENGTH, Charset
from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.source import ImageSource

_OUTSIDE = "outside the charset"
#: Characters outside the charset that are named.
_SHOWN = 5
_CHUNK = 65_536


def seeded_share(records: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Places of a random share of records, ascending; for one seed smaller shares are contained in greater ones.

    Args:
        records: [n] int64 record numbers, on which alone the choice depends.
        share: in (0, 1]; the number of places is rounded, at least one.
        seed: of the stream SUBSET.
    Raises:
        ValueError: share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"seeded_share: share must be in (0, 1], got {share}")
    words = random.words(torch.from_numpy(records), 2, seed=seed, stream=random.SUBSET, epoch=0)
    order = torch.argsort(words[:, 0] * 2**31 + (words[:, 1] >> 1), stable=True).numpy()
    return np.sort(order[: max(1, round(share * len(records)))])


class LabelledSet:
    """The records of a source that a decoder can be trained on.

    Args:
        source: images and labels.
        charset: the characters a label may have after normalisation.
        normalise: applied to every label first; None: labels stay as they are.
        max_length: longest label in characters, after normalisation.
        unknown: what a label with a character outside the charset means: its record is dropped, or an error.
        reject: normalised label -> why its record is dropped all the same, or None.

    Attributes:
        records: [n] int64 record numbers of the source, ascending.
        labels: n normalised labels.
        dropped: reason -> number of records.
        lacking: character outside the charset -> labels that are dropped for it.
        total: records looked at.

    Raises:
        ConfigError: nothing is kept, or (`unknown="error"`) a label has a character outside the charset.
    """

    def __init__(
        self,
        source: ImageSource,
        charset: Charset,
        *,
        normalise: Callable[[str], str] | None = None,
        max_length: int = MAX_LENGTH,
        unknown: Literal["drop", "error"] = "drop",
        reject: Callable[[str], str | None] | None = None,
    ) -> None:
        self.source, self.charset, self.total = source, charset, len(source)
        self.dropped: Counter[str] = Counter()
        self.lacking: Counter[str] = Counter()
        self.labels: list[str] = []
        records: list[int] = []
        for first in range(0, len(source), _CHUNK):
            chunk = range(first, min(first + _CHUNK, len(source)))
            for record, raw in zip(chunk, source.labels(chunk)):
                label = normalise(raw) if normalise and raw is not None else raw
                reason = self._reason_against(label, max_length)
                if reason is None and reject is not None and label is not None:
                    reason = reject(label)
                if label is None or reason is not None:
                    if reason == _OUTSIDE and unknown == "error":
                        raise ConfigError(
                            f"{source.name(record)}: expected a label in the {len(charset)}-character set, "
                            f"got {charset.missing(label or '')!r} in {label!r}"
                        )
                    self.dropped[reason or "unlabelled"] += 1
                    self.lacking.update(charset.missing(label or "") if reason == _OUTSIDE else "")
                    continue
                records.append(record)
                self.labels.append(label)
        if not records:
            raise ConfigError(f"expected labelled images, but none can be used: {self.describe()}")
        self.records = np.array(records, dtype=np.int64)

    def _reason_against(self, label: str | None, max_length: int) -> str | None:
        if label is None:
            return "unlabelled"
        if not label:
            return "empty after normalisation"
        if len(label) > max_length:
            return f"longer than {max_length} characters"
        return _OUTSIDE if self.charset.missing(label) else None

    def __len__(self) -> int:
        return len(self.labels)

    def describe(self) -> str:
        """One line: how many are kept and why the others are not."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        if self.lacking:
            reasons += "; it lacks " + ", ".join(f"{c!r} of {n} labels" for c, n in self.lacking.most_common(_SHOWN))
            if any(c != c.upper() and not self.charset.missing(c.upper()) for c in self.lacking):
                reasons += ", which it has as capitals: a charset must be written as the protocol writes labels"
        return f"{len(self)} of {self.total} records kept" + (f" ({reasons})" if reasons else "")

    def subset(self, share: float, seed: int) -> "LabelledSet":
        """A random subset; for one seed smaller ones are contained in greater ones.

        Args:
            share: in (0, 1]; the number of records is rounded, at least one.
            seed: of the stream SUBSET; the choice depends on the record numbers, not on the labels.
        Raises:
            ValueError: share outside (0, 1].
        """
        return self._choose(seeded_share(self.records, share, seed))

    def _choose(self, places: np.ndarray) -> "LabelledSet":
        chosen = object.__new__(LabelledSet)
        chosen.source, chosen.charset, chosen.total = self.source, self.charset, self.total
        chosen.dropped, chosen.lacking = self.dropped.copy(), self.lacking.copy()
        if len(places) < len(self):
            chosen.dropped["not in the subset"] += len(self) - len(places)
        chosen.records = self.records[places]
        chosen.labels = [self.labels[i] for i in places]
        return chosen
