"""Trained networks, as they come in and go out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rcmstr_fast.config import ModelConfig
from rcmstr_fast.evaluation.recogniser import Recogniser


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
