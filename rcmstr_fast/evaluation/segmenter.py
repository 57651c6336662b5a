"""Encoder and segmentation head as one network, and its file `segmenter.safetensors`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rcmstr_fast.config import ConfigError, ModelConfig, is_vit
from rcmstr_fast.evaluation.over_encoder import OverEncoder, Precision
from rcmstr_fast.models import build_encoder
from rcmstr_fast.models.segmentation import SegmentationHead
from rcmstr_fast.ops.precision import full_precision
from rcmstr_fast.train.checkpoint import write_whole
from rcmstr_fast.train.export import refuse_nonfinite

FORMAT = "rcmstr_fast segmenter 1"
#: Above this value of the head a pixel is text; the targets are 0 and 1.
THRESHOLD = 0.5


class Segmenter(OverEncoder):
    """Images to masks of text.

    There is no rectifier in it, which would move the pixels away from their places in the picture.

    Attributes, beside those of `OverEncoder`:
        head: a `SegmentationHead`.
        shape: its blocks, heads and dim.
    """

    kind = "segmentation network"

    def __init__(
        self,
        model: ModelConfig,
        encoder: nn.Module,
        *,
        blocks: int = 3,
        heads: int = 2,
        dim: int = 384,
        frozen: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        """Put a freshly initialised head on an encoder."""
        super().__init__(model, nn.Identity(), encoder, frozen=frozen, precision=precision)
        self.shape = {"blocks": blocks, "heads": heads, "dim": dim}
        self.head = SegmentationHead(
            self.encoder.token_channels, self.size, frames=not is_vit(self.model), **self.shape
        )

    def frames(self, views: Tensor) -> Tensor:
        """Normalised images `[B, 3, H, W]` to tokens `[B, N, C]`, without gradient where the encoder is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen), self.autocast():
            return self.encoder.tokens(views)

    def forward(self, frames: Tensor) -> Tensor:
        """What `frames` gave to `[B, H, W]` float32, near 1 where there is text."""
        with self.autocast():
            return full_precision(self.head(frames))

    def loss(self, frames: Tensor, targets: Tensor) -> Tensor:
        """L1 between prediction and masks (paper section IV-D).

        Args:
            frames: `[B, N, C]`.
            targets: `[B, H, W]` float32, 1 where there is text and 0 elsewhere.
        Returns:
            0-d float32.
        """
        return (self(frames) - targets).abs().mean()

    def loss_terms(self, targets: Tensor) -> int:
        """The pictures; all have as many pixels."""
        return len(targets)

    @torch.no_grad()
    def masks(self, frames: Tensor) -> Tensor:
        """What `frames` gave to `[B, H, W]` bool: text."""
        return self(frames) > THRESHOLD

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """Write weights and network, with further facts (JSON values) for the reader."""
        precision, tensors = self.stored()
        header = {
            "format": FORMAT,
            "model": asdict(self.model),
            "precision": precision,
            "rotate": self.rotate,
            "facts": facts,
            **self.shape,
        }
        data = save(tensors, {"rcmstr_fast": json.dumps(header, ensure_ascii=False)})
        write_whole(path, lambda file: file.write(data))


def load_segmenter(path: str | Path) -> tuple[Segmenter, dict[str, Any]]:
    """Read a segmentation network in evaluation mode.

    Args:
        path: segmenter.safetensors, or the run folder that holds it.
    Returns:
        The network on the CPU and the facts stored with it.
    Raises:
        ConfigError: missing, cut off, some other file, or values that are not finite.
    """
    path = Path(path)
    path = path / "segmenter.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"expected a segmenter.safetensors or its run folder, got {path}")
    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {}).get("rcmstr_fast", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise ConfigError(f"{path}: expected a file of format {FORMAT!r}, got {header.get('format')!r}")
        refuse_nonfinite(tensors, str(path))
        model = ModelConfig(**header["model"])
        shape = {name: header[name] for name in ("blocks", "heads", "dim")}
        segmenter = Segmenter(model, build_encoder(model), precision=header["precision"], **shape)
        segmenter.load_state_dict(tensors)
    except ConfigError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: expected a whole segmenter.safetensors of rcmstr_fast: {reason}") from error
    segmenter.rotate = "tall" if header.get("rotate") == "tall" else "never"
    return segmenter.eval(), header["facts"]
