"""What is exported: the encoder or the recogniser of a run folder or file."""

import json
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from rcmstr_fast.config import ConfigError, ModelConfig, resolve_model
from rcmstr_fast.evaluation.network_files import load_recogniser
from rcmstr_fast.exchange.networks import Source
from rcmstr_fast.train.export import KIND
from rcmstr_fast.train.exported import load_encoder

Part = Literal["auto", "encoder", "recogniser"]
_FILES = ("recogniser.safetensors", "encoder.safetensors")


def open_source(path: str | Path, part: Part = "auto") -> Source:
    """Load what a run folder or an exported file holds.

    Args:
        path: a run folder of a pretraining or a probe, an encoder.safetensors, or a recogniser.safetensors.
        part: `encoder` leaves the decoder of a recogniser behind; `recogniser` asks for one; `auto`: what is there.
    Raises:
        ConfigError: there is no such file, it is damaged, or holds an encoder where a recogniser is asked for.
    """
    file = _file_of(Path(path))
    if _is_encoder(file):
        if part == "recogniser":
            raise ConfigError(f"part=recogniser needs a recogniser, {file} holds an encoder")
        encoder, rectifier, header = load_encoder(file)
        model = resolve_model(ModelConfig(**header["config"]["model"]))
        return Source(file, model, encoder.eval(), rectifier.eval(), None, header)
    recogniser, facts = load_recogniser(file)
    kept = recogniser if part != "encoder" else None
    return Source(file, recogniser.model, recogniser.encoder.eval(), recogniser.rectifier.eval(), kept, facts)


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise ConfigError(
                f"expected a run folder, an encoder or a recogniser file, got {path}, which does not exist"
            )
        return path
    found = [path / name for name in _FILES if (path / name).is_file()]
    if not found:
        raise ConfigError(f"expected a run folder with {' or '.join(_FILES)}, {path} holds neither")
    return found[0]


def _is_encoder(file: Path) -> bool:
    try:
        with safe_open(str(file), "pt") as opened:
            header = json.loads((opened.metadata() or {}).get("rcmstr_fast", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected a file that this program exported, or it is cut off ({error})") from error
    return isinstance(header, dict) and header.get("kind") == KIND
