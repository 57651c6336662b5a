"""Encoder, decoder and charset as one model."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError, ModelConfig, num_frames
from rcmstr_fast.evaluation.over_encoder import OverEncoder, Precision
from rcmstr_fast.models.batch_norm import GroupedBatchNorm
from rcmstr_fast.models.decoders import DECODERS, MAX_LENGTH, Trace, build_decoder, frames_needed
from rcmstr_fast.models.encoder import Encoder

Memory = Literal["auto", "tokens", "frames", "both"]


class Recogniser(OverEncoder):
    """Images to text.

    Attributes, beside those of `OverEncoder`:
        decoder_name: of `models.decoders.DECODERS`.
        hidden: LSTM units a direction of the CTC and attention decoders.
        memory: what the decoder reads: the encoder's `tokens`, its `frames`, or `both`, frames and columns of tokens
            side by side (SeqCLR's (H, V)).
        charset: the characters.
        max_length: longest text in characters.
        normalise: frames go to the decoder with each channel at mean 0 and deviation 1.
    """

    format = "rcmstr_fast recogniser 2"

    def __init__(
        self,
        model: ModelConfig,
        rectifier: nn.Module,
        encoder: Encoder,
        decoder_name: str,
        charset: Charset,
        *,
        hidden: int = 256,
        frozen: bool = False,
        bn: Literal["running", "batch"] = "running",
        normalise: bool = False,
        memory: Memory = "auto",
        max_length: int = MAX_LENGTH,
        precision: Precision = "fp32",
    ) -> None:
        """Put a freshly initialised decoder behind a rectifier and an encoder; memory=auto: as the decoder has it.

        Raises:
            ConfigError: the decoder cannot read this memory.
        """
        super().__init__(model, rectifier, encoder, frozen=frozen, bn=bn, precision=precision)
        self.decoder_name = decoder_name
        self.kind = f"{decoder_name} recogniser"
        self.hidden = hidden
        self.charset = charset
        self.normalise = normalise
        self.memory = DECODERS[decoder_name].default_memory if memory == "auto" else memory
        self.max_length = max_length
        _check_memory(self.model, decoder_name, self.memory)
        taken = {"tokens": encoder.token_channels, "frames": encoder.out_channels}
        channels = taken.get(self.memory, sum(taken.values()))
        self.scale = GroupedBatchNorm(channels, 1, affine=False) if normalise else nn.Identity()
        self.decoder = build_decoder(decoder_name, channels, len(charset), hidden=hidden, max_length=max_length)

    @property
    def num_frames(self) -> int:
        """Frames T of the encoder's sequence."""
        return num_frames(self.model)

    @property
    def ctc_frames(self) -> int:
        """Frames that a CTC path has; 0 for other decoders."""
        return self.num_frames if self.decoder_name.startswith("ctc") else 0

    def beyond_ctc(self, text: str) -> bool:
        """Whether no path of this decoder spells the text, because CTC has too few frames."""
        return 0 < self.ctc_frames < frames_needed(text)

    def frames(self, views: Tensor) -> Tensor:
        """Normalised images `[B, 3, H, W]` to what the decoder reads, `[B, N, C]`, without gradient where frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen), self.autocast():
            images = self.rectifier(views)
            if self.memory == "frames":
                return self.encoder(images)
            tokens = self.encoder.tokens(images)
            if self.memory == "tokens":
                return tokens
            return torch.cat([self.encoder.masked_frames(tokens), self.encoder.columns(tokens)], dim=2)

    def loss(self, frames: Tensor, texts: Sequence[str]) -> Tensor:
        """The decoder's loss for B texts of the charset, 0-d float32."""
        ids = [torch.tensor(self.charset.encode(text, self.decoder.num_special), dtype=torch.int64) for text in texts]
        lengths = torch.tensor([len(row) for row in ids])
        targets = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        device = frames.device
        with self.autocast():
            return self.decoder.loss(self.scale(frames), targets.to(device), lengths.to(device))

    def loss_terms(self, texts: Sequence[str]) -> int:
        """How many terms `loss` of these texts is the mean of."""
        return self.decoder.terms([len(text) for text in texts])

    @torch.no_grad()
    def read(self, frames: Tensor) -> tuple[list[str], list[float]]:
        """What `frames` gave, `[B, N, C]`, to B texts and their confidences in [0, 1]."""
        with self.autocast():
            ids, confidence = self.decoder.greedy(self.scale(frames))
        return self.texts(ids), confidence.tolist()

    @torch.no_grad()
    def trace(self, frames: Tensor) -> Trace:
        """The same texts as ids, with the probability of each character and where the decoder looked for it."""
        with self.autocast():
            return self.decoder.trace(self.scale(frames))

    def texts(self, ids: Tensor) -> list[str]:
        """The decoder's ids `[B, L]` to B texts."""
        first = self.decoder.num_special
        return [self.charset.decode([i for i in row if i >= first], first) for row in ids.tolist()]

    def read_images(self, images: np.ndarray) -> tuple[list[str], list[float]]:
        """Pictures [B, H, W, 3] uint8 at the input size to B texts and confidences, in evaluation mode."""
        self.eval()
        if not len(images):
            return [], []
        pictures = torch.from_numpy(images).to(next(self.parameters()).device)
        index = torch.arange(len(images), device=pictures.device)
        with torch.no_grad():
            return self.read(self.frames(self.views(pictures, index=index)))

    def described(self) -> dict[str, Any]:
        """Decoder and charset, as the file's header has them."""
        return {
            "decoder": self.decoder_name,
            "hidden": self.hidden,
            "normalise": self.normalise,
            "memory": self.memory,
            "max_length": self.max_length,
            "charset": self.charset.to_list(),
            "normalisation": {"mean": 0.5, "std": 0.5, "size": self.size},
        }


def _check_memory(model: ModelConfig, decoder: str, memory: str) -> None:
    if memory == "both" and model.sequence == "none":
        raise ConfigError(
            "memory=both reads the encoder's sequence beside what it is made of: model.sequence must be bilstm, "
            f"got {model.sequence!r}"
        )
    if memory == "tokens" and decoder.startswith("ctc") and model.encoder.startswith("vit"):
        raise ConfigError(f"memory must be frames for {decoder}, which reads from left to right, got {memory!r}")
