"""What recognisers and segmentation networks share: an encoder below, frozen or trained, and what goes in."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from rcmstr_fast.config import ConfigError, ModelConfig, resolve_model
from rcmstr_fast.data.decode import Rotate
from rcmstr_fast.models.placing import placed
from rcmstr_fast.ops.augment_views import PresetLike, augment_views
from rcmstr_fast.train.checkpoint import write_whole

Precision = Literal["fp32", "bf16", "fp64"]


class OverEncoder(nn.Module):
    """A network over a rectifier and an encoder, which `evaluation.fit` trains.

    Attributes:
        kind: what it is, for messages.
        format: first entry of its file's header.
        model: the network's configuration, resolved.
        precision: of everything it computes, in training and in reading: fp32, bf16 (autocast), or fp64 (its weights then are
            float64, too).
        frozen: rectifier and encoder keep their weights and give frames without gradient.
        bn: while what stands on a frozen encoder trains: `running` statistics, or `batch` statistics that also
            re-estimate the running ones.
        rotate: how pictures have to be decoded for it, see `data.decode.decode_image`.
    """

    rotate: Rotate = "never"
    kind = "network"
    format = ""

    def __init__(
        self,
        model: ModelConfig,
        rectifier: nn.Module,
        encoder: nn.Module,
        *,
        frozen: bool = False,
        bn: Literal["running", "batch"] = "running",
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.model = resolve_model(model)
        self.rectifier: Any = rectifier
        self.encoder: Any = encoder
        self.frozen, self.bn, self.precision = frozen, bn, precision
        if frozen:
            self.rectifier.requires_grad_(False)
            self.encoder.requires_grad_(False)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the input in pixels."""
        return self.model.height, self.model.image_width

    def train(self, mode: bool = True) -> "OverEncoder":
        """Training or evaluation mode; a frozen encoder stays in evaluation mode unless `bn` is batch."""
        super().train(mode)
        if self.frozen:
            self.rectifier.eval()
            self.encoder.train(mode and self.bn == "batch")
        return self

    def autocast(self) -> torch.autocast:
        """The precision of training and reading."""
        device = next(self.parameters()).device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def views(
        self, images: Tensor, *, seed: int = 0, epoch: int = 0, index: Tensor, preset: PresetLike = "none"
    ) -> Tensor:
        """Pictures as the encoder takes them, see `ops.augment_views`.

        Args:
            images: `[B, H, W, 3]` uint8 at the input size, on the model's device.
            seed: of the augmentation.
            epoch: of the augmentation.
            index: `[B]` int64, numbers of the pictures in the epoch.
            preset: augmentation; none: normalised only.
        Returns:
            `[B, 3, H, W]` in the model's precision.
        """
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        made = augment_views(
            images, seed=seed, epoch=epoch, index=index, num_views=1, size=self.size, preset=preset, dtype=dtype
        )[0]
        return made.double() if self.precision == "fp64" else made

    def move(self, device: torch.device) -> None:
        """Move this network to a device, and its weights to the dtype of its precision."""
        dtype = torch.float64 if self.precision == "fp64" else torch.float32
        placed(self, device, dtype)

    def described(self) -> dict[str, Any]:
        """What the file's header says of the part above the encoder; JSON values."""
        raise NotImplementedError

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """Write network and weights as one file, which `network_files` reads.

        The weights of a network that was trained in float64, to compare runs, are written as float32.

        Args:
            path: the file.
            facts: for the reader; JSON values.
        """
        doubled = self.precision == "fp64"
        header = {
            "format": self.format,
            "model": asdict(self.model),
            **self.described(),
            "precision": "fp32" if doubled else self.precision,
            "rotate": self.rotate,
            "facts": facts,
        }
        held = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        tensors = {name: x.float() if doubled and x.dtype == torch.float64 else x for name, x in held.items()}
        data = save(tensors, {"rcmstr_fast": json.dumps(header, ensure_ascii=False)})
        write_whole(path, lambda file: file.write(data))

    def frames(self, views: Tensor) -> Tensor:
        """Normalised images `[B, 3, H, W]` to what is trained on them, `[B, N, C]`, without gradient where frozen."""
        raise NotImplementedError

    def loss(self, frames: Tensor, targets: Any) -> Tensor:
        """The loss of what `frames` gave, 0-d float32."""
        raise NotImplementedError

    def loss_terms(self, targets: Any) -> int:
        """How many terms `loss` of these targets is the mean of."""
        raise NotImplementedError

    def changes(self) -> dict[str, Tensor]:
        """The part of the state that training changes: all but the encoder where that is left as it is."""
        kept = ("encoder.", "rectifier.") if self.frozen and self.bn == "running" else ()
        return {name: x for name, x in self.state_dict().items() if not name.startswith(kept)}

    def load_changes(self, state: dict[str, Tensor]) -> None:
        """Put back what `changes` gave.

        Raises:
            ConfigError: the state of another network.
        """
        expected = {name: x.shape for name, x in self.changes().items()}
        if {name: x.shape for name, x in state.items()} != expected:
            raise ConfigError(f"expected a checkpoint of this {self.kind}, it is of another network")
        self.load_state_dict(state, strict=False)
