"""What a probe is made of: the recogniser and the words, from the configuration."""

import dataclasses
import json
import logging
from dataclasses import dataclass

import torch
from torch import nn

from rcmstr_fast.config import ConfigError, ModelConfig, resolve_model
from rcmstr_fast.data.charset import Charset
from rcmstr_fast.data.decode import Rotate
from rcmstr_fast.evaluation.apart import check_contents, without_copies
from rcmstr_fast.evaluation.config import ProbeConfig
from rcmstr_fast.evaluation.decoder_data import Words, open_words, split_words, training_words
from rcmstr_fast.evaluation.protocols import Protocol
from rcmstr_fast.evaluation.recogniser import Precision, Recogniser
from rcmstr_fast.models import build_encoder, build_rectifier
from rcmstr_fast.train.export import load_encoder

_log = logging.getLogger(__name__)


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
    dropped = dict(usable.dropped)
    if not config.val and len(val):
        train, copies = without_copies(train, val)
        if copies:
            dropped["copy of a validation word"] = copies
            _log.warning("train: %d words are left out, whose pictures are also those of validation words", copies)
    sets, inside = {"train": train}, {"val": val} if len(val) else {}
    if config.val:
        sets["val"] = open_words(config.val, "val")
        val, inside = _validation_targets(sets["val"], protocol), {}
    opened = {name: open_words([path], f"test {name}") for name, path in tests.items()}
    check_contents(config, sets, {f"test {name}": words for name, words in opened.items()}, inside)
    return ProbeData(train, val, opened, dropped)


def _validation_targets(words: Words, protocol: Protocol) -> Words:
    """The words that count under the protocol, labelled with its normalised strings."""
    targets = [protocol.target(label) for label in words.labels]
    kept = [i for i, (_, reason) in enumerate(targets) if reason is None]
    if not kept:
        raise ConfigError(f"val must hold words that count under {protocol.name}, got none among {len(words)}")
    return Words(words.source, words.records[kept], [targets[i][0] for i in kept])


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


def rotation(config: ProbeConfig) -> Rotate:
    """Whether tall pictures are turned: as ordered, or as in the pretraining of the encoder."""
    if config.rotate != "encoder":
        return config.rotate
    if config.encoder in ("", "random"):
        return "never"
    return load_encoder(config.encoder)[2]["config"].get("data", {}).get("rotate", "never")
