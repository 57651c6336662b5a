"""What a probe is made of: the recogniser and the words, from the configuration."""

import dataclasses
import json
import os
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import nn

from rcmstr_fast.config import ConfigError, ModelConfig, resolve_model
from rcmstr_fast.data.charset import Charset
from rcmstr_fast.evaluation.config import ProbeConfig
from rcmstr_fast.evaluation.decoder_data import Words, open_words, split_words, training_words
from rcmstr_fast.evaluation.protocols import Protocol
from rcmstr_fast.evaluation.recogniser import Precision, Recogniser
from rcmstr_fast.models import build_encoder, build_rectifier
from rcmstr_fast.train.export import load_encoder


@dataclass(frozen=True)
class ProbeData:
    """The words of a run.

    Attributes:
        train: usable training words, labelled with the first protocol's normalised strings.
        val: validation words, labelled likewise.
        tests: name -> labelled words as stored.
        dropped: reason -> training words left out.
    """

    train: Words
    val: Words
    tests: dict[str, Words]
    dropped: dict[str, int]

    def listing(self, config: ProbeConfig) -> str:
        """The record numbers used for training and validation, as JSON."""
        facts = {
            "seed": config.seed,
            "subset": config.subset,
            "train": _listed(self.train, config.train),
            "val": _listed(self.val, config.val or config.train),
        }
        return json.dumps(facts) + "\n"


def _listed(words: Words, roots: list[str]) -> dict[str, list]:
    return {"roots": roots, "sizes": [int(n) for n in words.source.sizes], "records": words.records.tolist()}


def open_data(config: ProbeConfig, protocol: Protocol, charset: Charset, tests: dict[str, str]) -> ProbeData:
    """Open every set, check that they are apart, split, choose and normalise.

    Args:
        config: checked.
        protocol: the first protocol of the run.
        charset: of the decoder.
        tests: name -> folder.
    Raises:
        ConfigError: a set that cannot be read, has no usable word, or overlaps another one.
    """
    usable = training_words(config.train, protocol, charset)
    train, val = split_words(usable, 0.0 if config.val else config.val_fraction, config.subset, config.seed)
    sets = {"train": train}
    if config.val:
        sets["val"] = open_words(config.val, "val")
        val = _validation_targets(sets["val"], protocol)
    opened = {name: open_words([path], f"test {name}") for name, path in tests.items()}
    for a, b in combinations(sets, 2):
        _check_apart(a, sets[a], b, sets[b])
    for name, words in opened.items():
        for a in sets:
            _check_apart(a, sets[a], f"test {name}", words)
    return ProbeData(train, val, opened, dict(usable.dropped))


def _validation_targets(words: Words, protocol: Protocol) -> Words:
    """The words that count under the protocol, labelled with its normalised strings."""
    targets = [protocol.target(label) for label in words.labels]
    kept = [i for i, (_, reason) in enumerate(targets) if reason is None]
    if not kept:
        raise ConfigError(f"val must hold words that count under {protocol.name}, got none among {len(words)}")
    return Words(words.source, words.records[kept], [targets[i][0] for i in kept])


def _check_apart(one: str, a: Words, other: str, b: Words) -> None:
    """Raise ConfigError where two sets share a database, a folder, or one lies within the other."""
    paths = [[os.path.realpath(found.path) for found in words.source.sets] for words in (a, b)]
    for x in paths[0]:
        for y in paths[1]:
            if os.path.commonpath([x, y]) in (x, y):
                raise ConfigError(f"{one} and {other} must be different words, both hold {max(x, y, key=len)}")


def build_recogniser(config: ProbeConfig, charset: Charset, precision: Precision = "fp32") -> Recogniser:
    """The untrained decoder on the encoder that the configuration names.

    Weights that are not read from a file depend on `config.seed` alone; those of the decoder do not depend on
    where the encoder came from.

    Raises:
        ConfigError: the encoder cannot be read or built.
    """
    with torch.random.fork_rng():
        encoder, rectifier, model = _encoder(config)
        torch.manual_seed(config.seed)
        decoder = config.decoder
        if decoder == "auto":
            decoder = "transformer" if model.encoder.startswith("vit") else "ctc"
        return Recogniser(
            model, rectifier, encoder, decoder, charset,
            hidden=config.decoder_hidden, frozen=config.mode == "frozen", bn=config.bn,
            normalise=config.normalise, memory=config.memory, max_length=config.max_length, precision=precision,
        )  # fmt: skip


def _encoder(config: ProbeConfig) -> tuple[nn.Module, nn.Module, ModelConfig]:
    if config.encoder not in ("", "random"):
        encoder, rectifier, header = load_encoder(config.encoder)
        return encoder, rectifier, resolve_model(ModelConfig(**header["config"]["model"]))
    model = dataclasses.replace(config.model)
    if config.like:
        model = ModelConfig(**load_encoder(config.like)[2]["config"]["model"])
    torch.manual_seed(config.seed)
    try:
        return build_encoder(model), build_rectifier(model), resolve_model(model)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error
