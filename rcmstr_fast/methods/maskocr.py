"""MaskOCR (Lyu et al., 2022), after its description; sizes are ours.

Vertical strips of a word are hidden. The encoder sees the rest; a regressor predicts the latents of what is hidden, and
a decoder paints its pixels from these alone. The language half reads the whole word from what is seen of it.
"""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast import ops
from rcmstr_fast.charset import Charset
from rcmstr_fast.config import MethodConfig, PretrainConfig, is_vit, require
from rcmstr_fast.fields import number
from rcmstr_fast.methods.base import EncoderMethod
from rcmstr_fast.methods.parts.labels import LabelSettings
from rcmstr_fast.methods.parts.monitors import detail, spread
from rcmstr_fast.methods.parts.regression import Reader, Regressor, StripDecoder, read_losses
from rcmstr_fast.methods.protocol import PICTURES, Batch, Collectives, Hidden, Pass, StepOutput, ViewSpec, to_pixels
from rcmstr_fast.methods.registry import register
from rcmstr_fast.models.mim_head import unpatchify
from rcmstr_fast.models.transformer import PATCH
from rcmstr_fast.models.vit import VisionTransformer
from rcmstr_fast.ops.precision import full_precision


@dataclass
class MaskOCRConfig(MethodConfig, LabelSettings):
    """MaskOCR: regress and paint hidden strips; with language=true also read the word that they are hidden from.

    Attributes:
        name: maskocr.
        mask_ratio: hidden share of the strips, each 4 pixels wide and as high as the word.
        regressor_layers: transformer layers of the latent regressor.
        decoder_layers: transformer blocks of the decoder.
        align_weight: weight of the squared error of the regressed latents.
        language: the language half too, on the words that have labels (rendered ones, say).
        language_layers: transformer layers of its decoder.
        language_weight: weight of its loss.
        language_frozen: its loss does not reach the encoder.
        language_only: the paper's second stage: the encoder, which train.init names, stays as it is, and the language
            half alone is trained.
    """

    name: str = "maskocr"
    mask_ratio: float = number(0.7, above=0, below=1)
    regressor_layers: int = number(4, low=1, high=24)
    decoder_layers: int = number(4, low=0, high=24)
    align_weight: float = number(2.0, low=0)
    language: bool = False
    language_layers: int = number(4, low=1, high=24)
    language_weight: float = number(1.0, low=0)
    language_frozen: bool = True
    language_only: bool = False

    @property
    def needs_labels(self) -> bool:
        """Only for its language half."""
        return self.language

    def check(self, run: PretrainConfig) -> None:
        """Something is hidden, something is seen, and no sequence model is left without a gradient."""
        strips = run.model.image_width // PATCH
        expected = (
            f"method.mask_ratio must hide 1 to {strips - 1} of the {strips} strips of an image for method {self.name}"
        )
        require(1 <= int(self.mask_ratio * strips) < strips, expected, self.mask_ratio)
        require(run.model.sequence == "none", f"model.sequence must be none for method {self.name}", run.model.sequence)
        require(self.language or not self.language_only, "method.language must be true for method.language_only", False)


@register(
    paper="MaskOCR (Lyu et al., 2022), after the description; sizes ours",
    needs=("masks", "labels with language"),
    labels=True,
    tiny={
        "regressor_layers": 1,
        "decoder_layers": 1,
        "language": True,
        "language_layers": 1,
        "max_length": 6,
        "bn_group_size": 2,
    },
)
class MaskOCR(EncoderMethod):
    """loss = loss_pixels + align_weight * loss_latents (+ language_weight * loss_language), or loss_language alone.

    The ViT encodes the tokens of the visible strips alone, and those of the hidden ones alone, without gradient, as the
    latents to regress. The CNN works on the visible sites (unit `column`); the latents to regress are those of a pass
    over the whole word without gradient, which also keeps its batch norms' running statistics.
    """

    Config = MaskOCRConfig

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        own = cast(MaskOCRConfig, config.method)
        self.own, self.vit = own, is_vit(config.model)
        self.size = config.model.height, config.model.image_width
        self.rows = self.size[0] // PATCH if self.vit else 1
        channels, places = self.encoder.token_channels, self.num_frames * self.rows
        self.reader: nn.Module | None = None
        if own.language_only:
            self.encoder.requires_grad_(False)
            self.rectifier.requires_grad_(False)
        else:
            self.regressor = Regressor(channels, places, own.regressor_layers)
            patch = 3 * PATCH * (PATCH if self.vit else self.size[0])
            self.decoder = StripDecoder(channels, places, patch, own.decoder_layers)
        if own.language:
            characters = len(Charset.load(own.charset).characters)
            self.reader = Reader(channels, places, characters, own.max_length, own.language_layers)

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """The word as it is."""
        return (ViewSpec("image", "none"),)

    def train(self, mode: bool = True) -> "MaskOCR":
        """Training or evaluation mode; in the second stage encoder and rectifier stay in evaluation mode."""
        super().train(mode)
        if self.own.language_only:
            self.encoder.eval()
            self.rectifier.eval()
        return self

    def remarks(self) -> list[str]:
        """A second stage needs a first one."""
        if not self.own.language_only or self.config.train.init:
            return []
        return [
            "method.language_only leaves an untrained encoder as it is; train.init names the run of the first stage"
        ]

    def masks(self, batch: Batch) -> ops.Masks:
        """Hidden strips, a function of (seed, epoch, index)."""
        return ops.draw_masks(
            batch.index,
            seed=self.config.seed,
            epoch=batch.epoch,
            size=self.size,
            unit="column",
            mask_ratio=self.own.mask_ratio,
            num_blocks=0,
        )

    @classmethod
    def passes(cls, config: PretrainConfig) -> tuple[Pass, ...]:
        """The visible strips; without gradient, the hidden strips (ViT) or the whole word (CNN)."""
        method = cast(MaskOCRConfig, config.method)
        trained, shown = not method.language_only, 1 - method.mask_ratio
        if is_vit(config.model):
            seen, rest = Pass(trained, shown), Pass(False, method.mask_ratio)
        else:
            seen, rest = Pass(trained, hidden=Hidden("column", method.mask_ratio, 0, "anchored")), Pass(False)
        return (seen, rest) if trained else (seen,)

    def forward(self, batch: Batch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """See `PretrainMethod`."""
        images, masks = self.rectifier(batch.views["image"]), self.masks(batch)
        if self.own.language_only:
            return self.read(images, masks, batch, monitor, pictures)
        encode = self.encode_tokens if self.vit else self.encode_frames
        seen, seen_at, unseen, wanted, wanted_at, counted = encode(images, masks)
        guessed = self.regressor(seen, seen_at, unseen, wanted_at)
        error = (full_precision(guessed) - full_precision(wanted)).square().mean(2)
        latents = ((error * counted).sum(1) / counted.sum(1).clamp(min=1)).mean()
        prediction = self.paint(self.decoder(guessed, wanted_at), wanted_at)
        target = full_precision(images.detach()) * 0.5 + 0.5
        pixels = ops.masked_mse(full_precision(prediction), target, masks.pixels)
        loss = pixels + self.own.align_weight * latents
        terms, watched, sheet = {"loss_pixels": pixels.detach(), "loss_latents": latents.detach()}, {}, {}
        if self.reader is not None:
            read, right = self.language(seen.detach() if self.own.language_frozen else seen, seen_at, unseen, batch)
            loss = loss + self.own.language_weight * read
            terms["loss_language"] = read.detach()
            if monitor:
                watched["accuracy"] = right
        if monitor:
            watched |= {
                "spread": spread(F.normalize(full_precision(seen.detach()).mean(1), dim=1)),
                "detail": detail(prediction.detach(), target, masks.pixels),
            }
        if pictures:
            shown, hidden = to_pixels(images), masks.pixels[:PICTURES]
            guess = prediction[:PICTURES].detach().float().clamp(0, 1)
            sheet = {"masked": shown.masked_fill(hidden, 0.5), "reconstruction": guess.where(hidden, shown)}
        return StepOutput(loss, terms | {"loss": loss.detach()}, watched, sheet)

    def read(self, images: Tensor, masks: ops.Masks, batch: Batch, monitor: bool, pictures: bool) -> StepOutput:
        """The second stage: `forward` without regression and reconstruction."""
        with torch.no_grad():
            seen, seen_at, unseen = (self.seen_tokens if self.vit else self.seen_frames)(images, masks)
        loss, right = self.language(seen, seen_at, unseen, batch)
        watched = {"accuracy": right, "spread": spread(F.normalize(full_precision(seen).mean(1), dim=1))}
        sheet = {"masked": to_pixels(images).masked_fill(masks.pixels[:PICTURES], 0.5)} if pictures else {}
        return StepOutput(loss, {"loss_language": loss.detach()}, watched if monitor else {}, sheet)

    def language(self, seen: Tensor, seen_at: Tensor, unseen: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """loss_language of what is seen of a batch, and the share of its words that are read without a fault."""
        assert self.reader is not None
        targets, lengths = batch.drawn["targets"], batch.drawn["lengths"]
        logits = self.reader(seen, seen_at, unseen)
        return read_losses(logits, targets, lengths).mean(), right_words(logits, targets, lengths)

    def seen_tokens(self, images: Tensor, masks: ops.Masks) -> tuple[Tensor, Tensor, None]:
        """The ViT's latents of visible strips, their places, None."""
        seen_at = self.places(masks)[1]
        return cast(VisionTransformer, self.encoder).part(images, seen_at), seen_at, None

    def seen_frames(self, images: Tensor, masks: ops.Masks) -> tuple[Tensor, Tensor, Tensor]:
        """The CNN's frames of the sparse pass, all places, the frames that saw nothing."""
        seen, active = self.encoder.forward_masked(images, masks, "anchored")
        assert active is not None
        return seen, torch.arange(seen.shape[1], device=seen.device).expand(len(seen), -1), ~active

    def places(self, masks: ops.Masks) -> tuple[Tensor, Tensor]:
        """Places of the hidden tokens of a ViT, and of the visible ones, each `[B, n]` int64."""
        grid = masks.grid.expand(-1, self.rows, -1).flatten(1)
        hidden = int(self.own.mask_ratio * masks.grid.shape[2]) * self.rows
        order = torch.argsort(grid.byte(), dim=1, stable=True, descending=True)
        return order[:, :hidden], order[:, hidden:]

    def encode_tokens(self, images: Tensor, masks: ops.Masks) -> tuple[Tensor, Tensor, None, Tensor, Tensor, Tensor]:
        """The ViT's latents of visible strips, their places, None, latents of hidden ones, their places, ones."""
        wanted_at = self.places(masks)[0]
        seen, seen_at, _ = self.seen_tokens(images, masks)
        with torch.no_grad():
            wanted = cast(VisionTransformer, self.encoder).part(images, wanted_at)
        return seen, seen_at, None, wanted, wanted_at, torch.ones_like(wanted[..., 0])

    def encode_frames(self, images: Tensor, masks: ops.Masks) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The CNN's frames of the sparse pass, all places, the frames that saw nothing, frames of the whole word, all
        places, and 1 for each frame that saw nothing."""
        seen, every, unseen = self.seen_frames(images, masks)
        with torch.no_grad():
            wanted = self.encoder.tokens(images)
        return seen, every, unseen, wanted, every, unseen.to(full_precision(seen).dtype)

    def paint(self, values: Tensor, places: Tensor) -> Tensor:
        """Values of patches [B, m, pixels] at places [B, m] as pictures [B, 3, H, W], grey where there are none."""
        if not self.vit:  # neighbouring frames are averaged to the columns between them
            return unpatchify(0.5 * (values[:, 1:] + values[:, :-1]), self.size)
        whole = values.new_full((len(values), self.num_frames * self.rows, values.shape[2]), 0.5)
        return unpatchify(whole.scatter(1, places[..., None].expand_as(values), values), self.size)


@torch.no_grad()
def right_words(logits: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """Share of the labelled words that are read without a fault, 0-d."""
    place = torch.arange(logits.shape[1], device=logits.device)
    wanted = F.pad(targets + 1, (0, 1)).where(place < lengths[:, None], 0)
    right = ((logits.argmax(2) == wanted) | (place > lengths[:, None])).all(1) & (lengths > 0)
    return right.sum() / (lengths > 0).sum().clamp(min=1)
