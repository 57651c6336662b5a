"""Networks over an encoder read back from their files, `recogniser.safetensors` and `segmenter.safetensors`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError, ModelConfig, resolve_model
from rcmstr_fast.evaluation.over_encoder import OverEncoder
from rcmstr_fast.evaluation.recogniser import Recogniser
from rcmstr_fast.evaluation.segmenter import Segmenter
from rcmstr_fast.fields import Bounds, check_fields, check_value
from rcmstr_fast.models import build_encoder, build_rectifier
from rcmstr_fast.models.decoders import MAX_LENGTH
from rcmstr_fast.train.export import refuse_nonfinite

#: Files of before memory, precision and longest text were recorded; of their decoders only `ctc` is still the same.
_FORMAT_1 = "rcmstr_fast recogniser 1"

N = TypeVar("N", bound=OverEncoder)


def load_recogniser(path: str | Path) -> tuple[Recogniser, dict[str, Any]]:
    """Read a recogniser in evaluation mode.

    Args:
        path: recogniser.safetensors, or the run folder that holds it.
    Returns:
        The recogniser on the CPU and the facts stored with it.
    Raises:
        ConfigError: missing, cut off, some other file, or values that are not finite.
    """
    return _load(path, "recogniser.safetensors", _recogniser)


def load_segmenter(path: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """Read a segmentation network in evaluation mode; path, result and errors as `load_recogniser`."""
    return _load(path, "segmenter.safetensors", _segmenter)


def _load(path: str | Path, name: str, build: Callable[[Path, dict[str, Any]], N]) -> tuple[N, dict[str, Any]]:
    """The network that `build` makes of a file and its header, with the file's weights, and the file's facts."""
    path = Path(path)
    path = path / name if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"{name.partition('.')[0]} must be a {name} or its run folder, got {path}")
    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {}).get("rcmstr_fast", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        network = build(path, header)
        refuse_nonfinite(tensors, str(path))
        network.load_state_dict(tensors)
        network.rotate = "tall" if header.get("rotate") == "tall" else "never"
        return network.eval(), header["facts"]
    except ConfigError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: expected a whole {name} of rcmstr_fast: {reason}") from error


def _recogniser(path: Path, header: dict[str, Any]) -> Recogniser:
    held = header.get("format")
    if held not in (Recogniser.format, _FORMAT_1):
        raise ConfigError(f"{path}: expected a file of format {Recogniser.format!r}, got {held!r}")
    if held == _FORMAT_1 and header.get("decoder") != "ctc":
        raise ConfigError(
            f"{path}: expected a file of format {Recogniser.format!r}; this {header.get('decoder')} decoder is of an "
            "earlier version, whose network was another: train it again"
        )
    check_value("hidden", header["hidden"], Bounds(low=1))
    model = _model(header)
    return Recogniser(
        model,
        build_rectifier(model),
        build_encoder(model),
        header["decoder"],
        Charset(header["charset"]),
        hidden=header["hidden"],
        normalise=header.get("normalise", False),
        memory=header.get("memory", "auto"),
        max_length=header.get("max_length", MAX_LENGTH),
        precision=header.get("precision", "fp32"),
    )


def _segmenter(path: Path, header: dict[str, Any]) -> Segmenter:
    if header.get("format") != Segmenter.format:
        raise ConfigError(f"{path}: expected a file of format {Segmenter.format!r}, got {header.get('format')!r}")
    model = _model(header)
    shape = {name: header[name] for name in ("blocks", "heads", "dim")}
    return Segmenter(model, build_encoder(model), precision=header["precision"], **shape)


def _model(header: dict[str, Any]) -> ModelConfig:
    """The architecture; a rectifier's weights are in the file, so its own checkpoint is not needed any more."""
    model = ModelConfig(**header["model"])
    check_fields(model)
    model.tps_checkpoint = "random" if model.tps == "frozen" else ""
    return resolve_model(model)
