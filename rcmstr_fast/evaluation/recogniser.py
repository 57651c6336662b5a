"""Encoder, decoder and charset as one model, and its file `recogniser.safetensors`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rcmstr_fast.config import ConfigError, ModelConfig, resolve_model
from rcmstr_fast.data.charset import Charset
from rcmstr_fast.models import build_encoder, build_rectifier
from rcmstr_fast.models.decoders import DECODERS
from rcmstr_fast.ops import augment_views
from rcmstr_fast.train.checkpoint import write_whole
from rcmstr_fast.train.export import refuse_nonfinite

FORMAT = "rcmstr_fast recogniser 1"


class Recogniser(nn.Module):
    """Images to text.

    Attributes:
        model: the network's configuration, resolved.
        decoder_name: ctc, attention or transformer.
        hidden: LSTM units a direction of the CTC and attention decoders.
        charset: the characters.
        frozen: rectifier and encoder keep their weights and give frames without gradient.
        bn: while a frozen encoder's decoder trains: `running` statistics, or `batch` statistics that also
            re-estimate the running ones.
        normalise: frames go to the decoder with each channel at mean 0 and deviation 1.
    """

    def __init__(
        self,
        model: ModelConfig,
        rectifier: nn.Module,
        encoder: nn.Module,
        decoder_name: str,
        charset: Charset,
        *,
        hidden: int = 256,
        frozen: bool = False,
        bn: Literal["running", "batch"] = "running",
        normalise: bool = False,
    ) -> None:
        """Put a freshly initialised decoder behind a rectifier and an encoder."""
        super().__init__()
        self.model = resolve_model(model)
        self.rectifier = rectifier
        self.encoder = encoder
        self.decoder_name = decoder_name
        self.hidden = hidden
        self.charset = charset
        self.frozen = frozen
        self.bn = bn
        self.normalise = normalise
        self.scale = nn.BatchNorm1d(encoder.out_channels, affine=False) if normalise else nn.Identity()
        made = DECODERS[decoder_name]
        units = {} if decoder_name == "transformer" else {"hidden": hidden}
        self.decoder = made(encoder.out_channels, made.num_special + len(charset), **units)
        if frozen:
            self.rectifier.requires_grad_(False)
            self.encoder.requires_grad_(False)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the input in pixels."""
        return self.model.height, self.model.image_width

    def train(self, mode: bool = True) -> "Recogniser":
        """Training or evaluation mode; a frozen encoder stays in evaluation mode unless `bn` is batch."""
        super().train(mode)
        if self.frozen:
            self.rectifier.eval()
            self.encoder.train(mode and self.bn == "batch")
        return self

    def frames(self, views: Tensor) -> Tensor:
        """Normalised images `[B, 3, H, W]` to frames `[B, T, C]`, without gradient where frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encoder(self.rectifier(views))

    def loss(self, frames: Tensor, texts: Sequence[str]) -> Tensor:
        """The decoder's loss for B texts of the charset, 0-d float32."""
        ids = [torch.tensor(self.charset.encode(text, self.decoder.num_special), dtype=torch.int64) for text in texts]
        lengths = torch.tensor([len(row) for row in ids])
        targets = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        device = frames.device
        return self.decoder.loss(self._scaled(frames), targets.to(device), lengths.to(device))

    @torch.no_grad()
    def read(self, frames: Tensor) -> tuple[list[str], list[float]]:
        """Frames `[B, T, C]` to B texts and their confidences in [0, 1]."""
        ids, confidence = self.decoder.greedy(self._scaled(frames))
        first = self.decoder.num_special
        texts = [self.charset.decode([i for i in row if i >= first], first) for row in ids.tolist()]
        return texts, confidence.tolist()

    def _scaled(self, frames: Tensor) -> Tensor:
        return self.scale(frames.flatten(0, 1)).view_as(frames)

    def read_images(self, images: np.ndarray) -> tuple[list[str], list[float]]:
        """Pictures [B, H, W, 3] uint8 at the input size to B texts and confidences, in evaluation mode."""
        self.eval()
        if not len(images):
            return [], []
        pictures = torch.from_numpy(images).to(next(self.parameters()).device)
        index = torch.arange(len(images), device=pictures.device)
        views = augment_views(pictures, seed=0, epoch=0, index=index, num_views=1, size=self.size, preset="none")
        with torch.no_grad():
            return self.read(self.frames(views[0]))

    def changes(self) -> dict[str, Tensor]:
        """The part of the state that training changes: all but the encoder where that is left as it is."""
        kept = self.frozen and self.bn == "running"
        changing = ("decoder.", "scale.") if kept else ""
        return {name: x for name, x in self.state_dict().items() if name.startswith(changing)}

    def load_changes(self, state: dict[str, Tensor]) -> None:
        """Put back what `changes` gave.

        Raises:
            ConfigError: the state of another network.
        """
        expected = {name: x.shape for name, x in self.changes().items()}
        if {name: x.shape for name, x in state.items()} != expected:
            raise ConfigError(f"expected a checkpoint of this {self.decoder_name} recogniser, it is of another network")
        self.load_state_dict(state, strict=False)

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """Write weights, network, decoder and charset, with further facts (JSON values) for the reader."""
        header = {
            "format": FORMAT,
            "model": asdict(self.model),
            "decoder": self.decoder_name,
            "hidden": self.hidden,
            "normalise": self.normalise,
            "charset": self.charset.to_list(),
            "normalisation": {"mean": 0.5, "std": 0.5, "size": self.size},
            "facts": facts,
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        data = save(tensors, {"rcmstr_fast": json.dumps(header, ensure_ascii=False)})
        write_whole(path, lambda file: file.write(data))


def load_recogniser(path: str | Path) -> tuple[Recogniser, dict[str, Any]]:
    """Read a recogniser in evaluation mode.

    Args:
        path: recogniser.safetensors, or the run folder that holds it.
    Returns:
        The recogniser on the CPU and the facts stored with it.
    Raises:
        ConfigError: missing, cut off, some other file, or values that are not finite.
    """
    path = Path(path)
    path = path / "recogniser.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"recogniser must be a recogniser.safetensors or its run folder, got {path}")
    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {}).get("rcmstr_fast", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise ConfigError(f"{path}: expected a file of format {FORMAT!r}, got {header.get('format')!r}")
        refuse_nonfinite(tensors, str(path))
        model = ModelConfig(**header["model"])
        # The weights of the rectifier are in this file: its own checkpoint is not needed any more.
        checkpoint = "random" if model.tps == "frozen" else ""
        built = resolve_model(ModelConfig(**(header["model"] | {"tps_checkpoint": checkpoint})))
        recogniser = Recogniser(
            built, build_rectifier(built), build_encoder(built), header["decoder"], Charset(header["charset"]),
            hidden=header["hidden"], normalise=header.get("normalise", False),
        )  # fmt: skip
        recogniser.load_state_dict(tensors)
    except ConfigError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: expected a whole recogniser.safetensors of rcmstr_fast: {reason}") from error
    return recogniser.eval(), header["facts"]
