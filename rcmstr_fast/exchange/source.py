"""What is exported: the encoder or the recogniser of a run folder or file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import nn

from rcmstr_fast.config import ConfigError, ModelConfig, resolve_model
from rcmstr_fast.evaluation.recogniser import Recogniser, load_recogniser
from rcmstr_fast.train.export import KIND, load_encoder

Part = Literal["auto", "encoder", "recogniser"]
_FILES = ("recogniser.safetensors", "encoder.safetensors")


@dataclass(frozen=True)
class Source:
    """Trained networks and what is known of them.

    Attributes:
        file: the safetensors file.
        model: the architecture, resolved.
        encoder: in evaluation mode.
        rectifier: `nn.Identity` for none.
        recogniser: with the same encoder; None where only the encoder is there or wanted.
        facts: the header of an encoder, or the facts of a recogniser.
    """

    file: Path
    model: ModelConfig
    encoder: nn.Module
    rectifier: nn.Module
    recogniser: Recogniser | None
    facts: dict[str, Any]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the input in pixels."""
        return self.model.height, self.model.image_width

    @property
    def kind(self) -> str:
        """encoder or recogniser."""
        return "encoder" if self.recogniser is None else "recogniser"


class Networks(nn.Module):
    """An encoder and its rectifier as `export_encoder` takes them from a method."""

    def __init__(self, encoder: nn.Module, rectifier: nn.Module) -> None:
        super().__init__()
        self.encoder, self.rectifier = encoder, rectifier

    def exported(self) -> dict[str, nn.Module]:
        """Both by name."""
        return {"encoder": self.encoder, "rectifier": self.rectifier}


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
