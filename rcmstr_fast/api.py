"""The package in three lines of Python: `load`, `load_encoder`, `pretrain` (documented in docs/weights.md)."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.exchange.reading import Picture, Reader, pixels_of
from rcmstr_fast.exchange.source import open_source
from rcmstr_fast.train.distributed import choose_device


def load(path: str | Path, *, device: str = "auto", precision: str = "auto") -> Reader:
    """A recogniser that reads pictures: `load("runs/probe").read(["a.jpg", array, pil_image])`.

    Args:
        path: run folder of a probe or fine-tuning, or a recogniser.safetensors.
        device: auto, cpu or cuda.
        precision: fp32, bf16 or auto (what it was trained and tested in).
    Returns:
        The reader; `read` gives a reading a picture: text, confidence in [0, 1], a confidence a character, error.
    Raises:
        ConfigError: one line that says what was expected and what came.
    """
    return Reader.load(path, device=device, precision=precision)


class LoadedEncoder(nn.Module):
    """A trained encoder behind its rectifier.

    Attributes:
        encoder: the network.
        rectifier: in front of it; `nn.Identity` for none.
        facts: the header of its file.
        size: (height, width) of its input in pixels.
    """

    def __init__(self, encoder: nn.Module, rectifier: nn.Module, facts: dict[str, Any], size: tuple[int, int]) -> None:
        super().__init__()
        self.encoder, self.rectifier, self.facts, self.size = encoder, rectifier, facts, size

    @torch.no_grad()
    def forward(self, batch: Tensor | Sequence[Picture]) -> Tensor:
        """Frames `[B, T, C]` of a batch, without gradient.

        Args:
            batch: images `[B, 3, H, W]` float, normalised `(x - 0.5) / 0.5`, or pictures (paths, bytes, uint8 arrays,
                Pillow images), which are decoded, resized and normalised.
        Raises:
            ConfigError: a picture cannot be read.
        """
        images = batch if isinstance(batch, Tensor) else self.images(batch)
        return self.encoder(self.rectifier(images.to(next(self.encoder.parameters()).device)))

    def images(self, pictures: Iterable[Picture]) -> Tensor:
        """Pictures as the encoder takes them, `[B, 3, H, W]` float32."""
        made = [pixels_of(picture, self.size) for picture in pictures]
        wrong = [f"picture {i}: {x}" for i, x in enumerate(made) if isinstance(x, str)]
        if wrong:
            raise ConfigError(wrong[0])
        pixels = torch.from_numpy(np.stack([x for x in made if not isinstance(x, str)]))
        return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def load_encoder(path: str | Path, *, device: str = "auto") -> LoadedEncoder:
    """An encoder: `frames = load_encoder("runs/first")(batch)`.

    Args:
        path: run folder of a pretraining, an encoder.safetensors (imported ones too), or a recogniser.
        device: auto, cpu or cuda.
    Raises:
        ConfigError: one line that says what was expected and what came.
    """
    source = open_source(path, "encoder")
    made = LoadedEncoder(source.encoder, source.rectifier, source.facts, source.size)
    return made.to(choose_device(device, 0)).eval()


def pretrain(config: PretrainConfig | Mapping[str, Any] | str | Path) -> Path:
    """Pretrain as `rcmstr pretrain` does: `pretrain({"run": "runs/first", "data": {"roots": "words"}})`.

    Args:
        config: a PretrainConfig, a YAML file, the name of a recipe, or a mapping with (some of) its fields.
    Returns:
        The run folder.
    Raises:
        ConfigError: an unknown field, a wrong value, or data that cannot be used.
        RunError: the run could not go on.
    """
    from rcmstr_fast.train.loop import pretrain as run

    return run(config if isinstance(config, PretrainConfig) else _configuration(config))


def _configuration(given: Mapping[str, Any] | str | Path) -> PretrainConfig:
    """Fields, a file or a recipe through the parser of the command line, which names an unknown field's nearest."""
    from rcmstr_fast.cli.arguments import Parser, add_pretraining, to_pretraining

    parser = Parser(prog="rcmstr_fast.pretrain")
    if isinstance(given, Mapping):
        method = given.get("method")
        name = method.get("name") if isinstance(method, Mapping) else None
        add_pretraining(parser, ["--method.name", str(name)] if name else [])
        parsed = parser.parse_object(dict(given))
    else:
        words = ["--config", str(given)]
        add_pretraining(parser, words)
        parsed = parser.parse_args(words)
    return to_pretraining(parser.instantiate(parsed))
