"""What a probe is made of: the recogniser and the words, from the configuration."""

import dataclasses
import logging
from collections import Counter

import torch
from torch import nn

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError, ModelConfig, resolve_model
from rcmstr_fast.data.decode import Rotate
from rcmstr_fast.evaluation.apart import check_contents, without_copies
from rcmstr_fast.evaluation.config import ProbeConfig, TrainedConfig
from rcmstr_fast.evaluation.decoder_data import Words, open_words, split_words, training_words
from rcmstr_fast.evaluation.over_encoder import Precision
from rcmstr_fast.evaluation.probe_data import ProbeData
from rcmstr_fast.evaluation.protocols import Protocol
from rcmstr_fast.evaluation.recogniser import Recogniser
from rcmstr_fast.models import Encoder, build_encoder, build_rectifier
from rcmstr_fast.train.export import read_export
from rcmstr_fast.train.exported import load_encoder

_log = logging.getLogger(__name__)


def open_data(
    config: ProbeConfig, protocol: Protocol, charset: Charset, tests: dict[str, str], ctc_frames: int = 0
) -> ProbeData:
    """Open every set, check that they are apart, split, choose and normalise.

    Args:
        config: checked.
        protocol: the first protocol of the run.
        charset: of the decoder.
        tests: name -> folder.
        ctc_frames: frames T of a CTC decoder; 0: another decoder.
    Raises:
        ConfigError: a set that cannot be read, has no usable word, or overlaps another one.
    """
    usable = training_words(config.train, protocol, charset, max_length=config.max_length, ctc_frames=ctc_frames)
    train, val = split_words(usable, 0.0 if config.val else config.val_fraction, config.subset, config.seed)
    own_val = open_words(config.val, "val") if config.val else None
    val_dropped: dict[str, int] = {}
    if own_val is not None:
        val, val_dropped = _validation_targets(own_val, protocol)
    opened = {name: open_words([path], f"test {name}") for name, path in tests.items()}
    found = ProbeData(train, val, opened, dict(usable.dropped), usable.total, val_dropped)
    return arranged(config, found, len(usable), own_val)


def arranged(config: TrainedConfig, data: ProbeData, usable: int, own_val: Words | None) -> ProbeData:
    """The sets of a run once they are known to be apart, with every record that is left out accounted for.

    Args:
        config: checked.
        data: as opened and split; `dropped` are the records that cannot be used.
        usable: records of the training roots that can be used.
        own_val: validation records of roots of their own, before any were left out; None: split off.
    Raises:
        ConfigError: sets overlap, or nothing is left to train on.
    """
    train, val, dropped = data.train, data.val, dict(data.dropped)
    split_off = 0 if own_val is not None else len(val)
    if split_off:
        dropped["for validation"] = split_off
    unused = usable - len(train) - split_off
    if unused:
        dropped["not in the subset"] = unused
    if split_off:
        train, copies = without_copies(train, val)
        if copies:
            dropped["copy of a validation word"] = copies
            _log.warning("train: %d words are left out, whose pictures are also those of validation words", copies)
    sets, inside = {"train": train}, {"val": val} if split_off else {}
    if own_val is not None:
        sets["val"] = own_val
    check_contents(config, sets, {f"test {name}": words for name, words in data.tests.items()}, inside)
    return dataclasses.replace(data, train=train, dropped=dropped)


def _validation_targets(words: Words, protocol: Protocol) -> tuple[Words, dict[str, int]]:
    """The words that count under the protocol, labelled with its normalised strings, and why the others do not.

    Words of whose labels nothing is left are no validation words: reading nothing would count as reading them.
    """
    targets = [protocol.target(label) for label in words.labels]
    reasons = [reason or (None if target else "empty after normalisation") for target, reason in targets]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    if not kept:
        raise ConfigError(f"val must hold words that count under {protocol.name}, got none among {len(words)}")
    dropped = dict(Counter(reason for reason in reasons if reason))
    return Words(words.source, words.records[kept], [targets[i][0] for i in kept]), dropped


def build_recogniser(config: ProbeConfig, charset: Charset, precision: Precision = "fp32") -> Recogniser:
    """The untrained decoder on the encoder that the configuration names.

    Weights that are not read from a file depend on `config.seed` alone; those of the decoder do not depend on
    where the encoder came from.

    Raises:
        ConfigError: the encoder cannot be read or built.
    """
    with torch.random.fork_rng():
        encoder, rectifier, model = build_base(config)
        torch.manual_seed(config.seed)
        decoder = config.decoder
        if decoder == "auto":
            decoder = "transformer" if model.encoder.startswith("vit") else "ctc"
        return Recogniser(
            model,
            rectifier,
            encoder,
            decoder,
            charset,
            hidden=config.decoder_hidden,
            frozen=config.mode == "frozen",
            bn=config.bn,
            normalise=config.normalise,
            memory=config.memory,
            max_length=config.max_length,
            precision=precision,
        )


def build_base(config: TrainedConfig) -> tuple[Encoder, nn.Module, ModelConfig]:
    """Encoder, rectifier and their resolved configuration, as `encoder`, `like` and `model` order them.

    Torch's generator is seeded with `config.seed` where they are untrained.

    Raises:
        ConfigError: the encoder cannot be read or built.
    """
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


def rotation(config: TrainedConfig) -> Rotate:
    """Whether tall pictures are turned: as ordered, or as in the pretraining of the encoder."""
    if config.rotate != "encoder":
        return config.rotate
    if config.encoder in ("", "random"):
        return "never"
    return read_export(config.encoder)[1]["config"].get("data", {}).get("rotate", "never")
