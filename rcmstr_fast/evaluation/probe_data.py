"""The words of an evaluation run."""

import json
from dataclasses import dataclass, field

from rcmstr_fast.evaluation.config import TrainedConfig
from rcmstr_fast.evaluation.decoder_data import Words


@dataclass(frozen=True)
class ProbeData:
    """The words of a run.

    Attributes:
        train: usable training words, labelled with the first protocol's normalised strings.
        val: validation words, labelled likewise.
        tests: name -> labelled words as stored.
        dropped: reason -> records of the training roots left out; with `train` they add up to `total`.
        total: records of the training roots.
        val_dropped: reason -> validation words left out.
    """

    train: Words
    val: Words
    tests: dict[str, Words]
    dropped: dict[str, int]
    total: int = 0
    val_dropped: dict[str, int] = field(default_factory=dict)

    def listing(self, config: TrainedConfig) -> str:
        """The record numbers used for training and validation, as JSON."""
        facts = {
            "seed": config.seed,
            "subset": config.subset,
            "train": _listed(self.train, config.train),
            "val": _listed(self.val, config.val or config.train),
        }
        return json.dumps(facts) + "\n"


def _listed(words: Words, roots: list[str] | str) -> dict[str, list]:
    return {"roots": roots, "sizes": [int(n) for n in words.source.sizes], "records": words.records.tolist()}
