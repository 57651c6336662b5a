"""The supervised baseline: encoder and decoder learn from labels under the budget of the pretraining methods."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import MethodConfig, PretrainConfig, Training, is_vit, require
from rcmstr_fast.fields import number
from rcmstr_fast.methods.base import EncoderMethod
from rcmstr_fast.methods.parts.ctc import ctc_losses, spellable
from rcmstr_fast.methods.parts.labels import LabelSettings
from rcmstr_fast.methods.parts.monitors import spread
from rcmstr_fast.methods.protocol import Batch, Collectives, Pass, StepOutput, ViewSpec, to_pixels
from rcmstr_fast.methods.registry import register
from rcmstr_fast.models.decoders import DECODERS, CTCDecoder, build_decoder
from rcmstr_fast.models.decoders.autoregressive import PAD, AutoregressiveDecoder, teacher
from rcmstr_fast.models.decoders.transformer import CachedAttention
from rcmstr_fast.ops.precision import full_precision


@dataclass
class SupervisedConfig(MethodConfig, LabelSettings):
    """Supervised: learn to read from labels; what is kept is the encoder, as of every other method.

    Attributes:
        name: supervised.
        decoder: ctc, ctc_linear, attention, attention_rclstr or transformer; null: attention (CNN), transformer (ViT).
        decoder_hidden: LSTM units a direction of the decoders that have any.
        augment: preset of the view.
    """

    cnn = Training(lr=5e-4, clip=5.0)
    vit = Training(batch=1024, epochs=10, lr=1.5e-4, weight_decay=0.05, min_lr=1e-5, clip=5.0)
    name: str = "supervised"
    decoder: Literal["ctc", "ctc_linear", "attention", "attention_rclstr", "transformer"] | None = None
    decoder_hidden: int = number(256, low=1)
    augment: Literal["none", "light", "pretrain"] = "light"

    def fill(self, run: PretrainConfig) -> None:
        """The decoder that the papers have on each kind of encoder."""
        self.decoder = self.decoder or ("transformer" if is_vit(run.model) else "attention")

    def check(self, run: PretrainConfig) -> None:
        """There is such a decoder."""
        names = ", ".join(DECODERS)
        require(self.decoder in DECODERS, f"method.decoder must be one of {names} for method {self.name}", self.decoder)


@register(
    paper="the supervised baseline of RCMSTR (Table II) and SeqCLR (Table 2)",
    needs=("labels",),
    labels=True,
    tiny={"decoder": "ctc", "decoder_hidden": 8, "max_length": 6, "bn_group_size": 2},
)
class Supervised(EncoderMethod):
    """Mean over images of the loss a character of each word; images without a readable label count as zero."""

    Config = SupervisedConfig

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        own = cast(SupervisedConfig, config.method)
        self.reads_tokens = DECODERS[str(own.decoder)].default_memory == "tokens"
        channels = self.encoder.token_channels if self.reads_tokens else self.encoder.out_channels
        characters = len(Charset.load(own.charset).characters)
        self.decoder = build_decoder(
            str(own.decoder), channels, characters, hidden=own.decoder_hidden, max_length=own.max_length
        )
        _without_dropout(self.decoder)

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """One view."""
        return (ViewSpec("image", cast(SupervisedConfig, config.method).augment),)

    @classmethod
    def passes(cls, config: PretrainConfig) -> tuple[Pass, ...]:
        """The view."""
        return (Pass(),)

    def forward(self, batch: Batch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """See `PretrainMethod`."""
        images = self.rectifier(batch.views["image"])
        memory = self.encoder.tokens(images) if self.reads_tokens else self.encoder(images)
        targets, lengths = batch.drawn["targets"] + self.decoder.num_special, batch.drawn["lengths"]
        if isinstance(self.decoder, CTCDecoder):
            logits = self.decoder(memory)
            losses, counted = ctc_losses(logits, targets, lengths), spellable(targets, lengths, logits.shape[1])
        else:
            logits, outputs = spelled(self.decoder, memory, targets, lengths)
            losses, counted = word_losses(logits, outputs, lengths), lengths > 0
        loss = losses.mean()
        watched = {}
        if monitor:
            right = self._right(memory, logits, targets, lengths) & counted
            watched = {
                "spread": spread(F.normalize(full_precision(memory.detach()).mean(1), dim=1)),
                "accuracy": right.sum() / counted.sum().clamp(min=1),
                "labelled": counted.float().mean(),
            }
        sheet = {"read": to_pixels(images)} if pictures else {}
        return StepOutput(loss, {"loss_supervised": loss.detach()}, watched, sheet)

    @torch.no_grad()
    def _right(self, memory: Tensor, logits: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        """[B] bool: the whole word was read, by an autoregressive decoder with the true characters before each."""
        place = torch.arange(targets.shape[1], device=targets.device)
        if isinstance(self.decoder, CTCDecoder):
            ids = F.pad(self.decoder.greedy(memory)[0], (0, len(place)))
            wanted = targets.where(place < lengths[:, None], 0)
            return (ids[:, : len(place)] == wanted).all(1) & ((ids > 0).sum(1) == lengths)
        _, outputs = teacher(targets, lengths)
        return ((logits.argmax(2) == outputs) | (outputs == PAD)).all(1)


def spelled(decoder: AutoregressiveDecoder, memory: Tensor, targets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, L + 1, K] of each position given the true characters before it, and what they should name."""
    inputs, outputs = teacher(targets, lengths)
    return decoder(memory, inputs), outputs


def word_losses(logits: Tensor, outputs: Tensor, lengths: Tensor) -> Tensor:
    """Mean cross entropy over the characters of each word and its end, 0 for words without characters.

    Args:
        logits: [B, L + 1, K]. Receives a gradient.
        outputs: [B, L + 1] int64: characters, end, then `PAD`.
        lengths: [B] int64.
    Returns:
        [B] float32 (float64 for float64 logits).
    """
    each = F.cross_entropy(full_precision(logits).transpose(1, 2), outputs, ignore_index=PAD, reduction="none")
    return (each.sum(1) / (lengths + 1)).where(lengths > 0, 0.0)


def _without_dropout(decoder: torch.nn.Module) -> None:
    """What is random in a run is a function of (seed, epoch, index), which dropout is not."""
    for part in decoder.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        elif isinstance(part, CachedAttention):
            part.dropout = 0.0
