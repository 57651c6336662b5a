"""`rcmstr export`: one function a format, each of which writes the file and gives the snippet that loads it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from rcmstr_fast.config import ConfigError, PretrainConfig, resolve
from rcmstr_fast.exchange import graph, layouts, snippets
from rcmstr_fast.exchange.archive import check_suffix, write_tensors
from rcmstr_fast.exchange.calibrate import Calibration, calibrate, validation_words
from rcmstr_fast.exchange.card import write_card
from rcmstr_fast.exchange.networks import Networks, Source
from rcmstr_fast.exchange.reading import CALIBRATION, Reader
from rcmstr_fast.exchange.source import Part, open_source
from rcmstr_fast.train.checkpoint import write_whole
from rcmstr_fast.train.export import export_encoder

Writer = Callable[[Source, Path, float], str]


@dataclass(frozen=True)
class Format:
    """A format.

    Attributes:
        write: writes the file of a source at a temperature and gives the snippet that loads it.
        recognisers: takes recognisers; every format takes encoders.
        tensors: a state dict, so the file may be safetensors or torch; otherwise `suffixes`.
        suffixes: of the file where `tensors` is False.
    """

    write: Writer
    recognisers: bool
    tensors: bool = True
    suffixes: tuple[str, ...] = ()


def export(
    run: str | Path,
    kind: str,
    out: str | Path,
    *,
    part: Part = "auto",
    named: list[str] | None = None,
    licence: str = "",
) -> tuple[Path, Path]:
    """Write a trained encoder or recogniser in another format, and a model card beside it.

    Args:
        run: a run folder or an exported file.
        kind: a key of `FORMATS`.
        out: the file to write; the card is `out` with the ending .md.
        part: what of a recogniser is taken.
        named: words to calibrate the confidences of a recogniser on, see `validation_words`.
        licence: of the weights, for the card.
    Returns:
        The file and the card.
    Raises:
        ConfigError: a wrong value, a network that the format cannot hold, or an unreadable run; nothing is written.
    """
    out = Path(out)
    if kind not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}")
    chosen = FORMATS[kind]
    if chosen.tensors:
        check_suffix(out)
    elif out.suffix not in chosen.suffixes:
        raise ConfigError(f"out must end in {' or '.join(chosen.suffixes)} for format={kind}, got {out.name}")
    source = open_source(run, part)
    if source.recogniser is not None and not chosen.recognisers:
        raise ConfigError(
            f"format={kind} holds encoders and {source.file} is a recogniser; --part encoder takes its encoder, "
            f"{', '.join(name for name, other in FORMATS.items() if other.recognisers)} hold the whole"
        )
    made = _calibrated(source, run, named or [])
    snippet = chosen.write(source, out, float(source.facts.get(CALIBRATION, {}).get("temperature", 1.0)))
    return out, write_card(source, kind, out, snippet, licence=licence, calibration=made.describe() if made else "")


def _calibrated(source: Source, run: str | Path, named: list[str]) -> Calibration | None:
    """The calibration that is asked for or was made before; it is kept in the facts of the source."""
    if not named:
        known = source.facts.get(CALIBRATION)
        return Calibration(**known) if known else None
    if source.recogniser is None:
        raise ConfigError("calibrate needs a recogniser, an encoder has no confidences")
    reader = Reader(source.recogniser, source.facts, device="cpu")
    made = calibrate(reader, *validation_words(run, named))
    source.facts[CALIBRATION] = vars(made)
    return made


def _state(source: Source) -> dict[str, Tensor]:
    return layouts.tensors_of(source.encoder, source.rectifier)


def _vit_only(source: Source, kind: str) -> None:
    model = source.model
    if not model.encoder.startswith("vit"):
        raise ConfigError(f"format={kind} holds vision transformers, {source.file} is a {model.encoder}; use dtrb")
    if model.sequence != "none" or model.tps != "none":
        part = "LSTM layers" if model.sequence != "none" else "rectifier"
        raise ConfigError(f"format={kind} has no place for the {part} of {source.file}; use onnx or torchscript")


def _timm(source: Source, out: Path, temperature: float) -> str:
    _vit_only(source, "timm")
    state = _state(source)
    write_tensors(out, {theirs: state[ours] for ours, theirs in layouts.timm_names(state).items()})
    return snippets.timm(source, out)


def _parseq(source: Source, out: Path, temperature: float) -> str:
    return _prefixed(source, out, "parseq", snippets.parseq, "")


def _openocr(source: Source, out: Path, temperature: float) -> str:
    return _prefixed(source, out, "openocr", snippets.openocr, "state_dict")


def _prefixed(source: Source, out: Path, kind: str, snippet: Callable[[Source, Path], str], holder: str) -> str:
    """timm's names under `encoder.`, in a project whose encoder has no place for a class token."""
    _vit_only(source, kind)
    if source.model.class_token or not source.model.final_norm:
        raise ConfigError(f"format={kind} has a final norm and no class token, {source.file} is different; use timm")
    state = _state(source)
    names = layouts.with_prefix(layouts.timm_names(state), "encoder.")
    write_tensors(out, {theirs: state[ours] for ours, theirs in names.items()}, holder)
    return snippet(source, out)


def _dtrb(source: Source, out: Path, temperature: float) -> str:
    model, recogniser = source.model, source.recogniser
    if model.encoder != "resnet29":
        raise ConfigError(f"format=dtrb holds the ResNet, {source.file} is a {model.encoder}; use timm or parseq")
    if model.tps != "none" and not model.tps_align_corners:
        raise ConfigError(
            "format=dtrb samples with align_corners=True, this rectifier was trained without: the frames would differ; "
            "use onnx or torchscript"
        )
    state = _state(source)
    made = {theirs: state[ours] for ours, theirs in layouts.dtrb_names(state).items()}
    if model.tps != "none":
        made |= layouts.dtrb_grid(*source.size)
    if recogniser is not None:
        if recogniser.decoder_name != "ctc" or recogniser.normalise or model.sequence != "none":
            what = "normalised frames" if recogniser.normalise else f"a {recogniser.decoder_name} decoder"
            what = "an encoder with LSTM layers of its own" if model.sequence != "none" else what
            raise ConfigError(f"format=dtrb holds BiLSTM and CTC behind the ResNet, this is {what}; use torchscript")
        head = recogniser.decoder.state_dict()
        made |= {
            name.replace("context.", "SequenceModeling.").replace("classifier.", "Prediction."): x
            for name, x in head.items()
        }
    write_tensors(out, {f"module.{name}": x for name, x in made.items()})
    return snippets.dtrb(source, out)


def _onnx(source: Source, out: Path, temperature: float) -> str:
    if source.recogniser is not None and source.recogniser.decoder.num_special > 1:
        raise ConfigError(
            f"format=onnx holds encoders and CTC recognisers; the {source.recogniser.decoder_name} decoder writes one "
            "character after the other: use torchscript (fixed length), or --part encoder"
        )
    graph.write_onnx(source, graph.build_graph(source, temperature), out)
    return snippets.onnx(source, out)


def _torchscript(source: Source, out: Path, temperature: float) -> str:
    graph.write_torchscript(source, graph.build_graph(source, temperature), out)
    return snippets.torchscript(source, out)


def _safetensors(source: Source, out: Path, temperature: float) -> str:
    if source.recogniser is not None:
        source.recogniser.save(out, source.facts)
    elif "kind" in source.facts:
        header = {"rcmstr_fast": json.dumps(source.facts)}
        data = save({name: x.contiguous() for name, x in _state(source).items()}, header)
        write_whole(out, lambda file: file.write(data))
    else:  # the encoder of a recogniser
        config = resolve(PretrainConfig(run="", model=source.model))
        method = Networks(source.encoder, source.rectifier)
        export_encoder(method, out, config, 0, facts={"origin": f"recogniser {source.file.name}"})
    return snippets.safetensors(source, out)


FORMATS: dict[str, Format] = {
    "timm": Format(_timm, recognisers=False),
    "dtrb": Format(_dtrb, recognisers=True),
    "parseq": Format(_parseq, recognisers=False),
    "openocr": Format(_openocr, recognisers=False),
    "onnx": Format(_onnx, recognisers=True, tensors=False, suffixes=(".onnx",)),
    "torchscript": Format(_torchscript, recognisers=True, tensors=False, suffixes=(".pt", ".ts")),
    "safetensors": Format(_safetensors, recognisers=True, tensors=False, suffixes=(".safetensors",)),
}
