"""MaskOCR (Lyu et al., 2022), after its description; sizes are ours.

Vertical strips of a word are hidden. The encoder sees the rest; a regressor predicts the latents of what is hidden, and
a decoder paints its pixels from these alone. The language half reads the whole word from what is seen of it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast import ops
from rcmstr_fast.charset import Charset
from rcmstr_fast.config import MethodConfig, PretrainConfig, is_vit, require
from rcmstr_fast.fields import number
from rcmstr_fast.methods.base import PICTURES, EncoderMethod, ViewSpec, to_pixels
from rcmstr_fast.methods.parts.labels import LabelSettings
from rcmstr_fast.methods.parts.monitors import detail, spread
from rcmstr_fast.methods.parts.regression import Reader, Regressor, StripDecoder, read_losses
from rcmstr_fast.methods.registry import register
from rcmstr_fast.methods.step import Batch, Collectives, StepOutput, full_precision
from rcmstr_fast.models.mim_head import unpatchify
from rcmstr_fast.models.vit import PATCH


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
        language_frozen: its loss does not reach the encoder (the paper's second stage, with the encoder frozen).
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

    def check(self, run: PretrainConfig) -> None:
        """Something is hidden, something is seen, and no sequence model is left without a gradient."""
        strips = run.model.image_width // PATCH
        expected = (
            f"method.mask_ratio must hide 1 to {strips - 1} of the {strips} strips of an image for method {self.name}"
        )
        require(1 <= int(self.mask_ratio * strips) < strips, expected, self.mask_ratio)
        require(run.model.sequence == "none", f"model.sequence must be none for method {self.name}", run.model.sequence)


@register(
    paper="MaskOCR (Lyu et al., 2022), after the description; sizes ours", needs=("masks", "labels with language"),
    labels=True,
    tiny={"regressor_layers": 1, "decoder_layers": 1, "language": True, "language_layers": 1, "max_length": 6,
          "bn_group_size": 2},
)  # fmt: skip
class MaskOCR(EncoderMethod):
    """loss = loss_pixels + align_weight * loss_latents (+ language_weight * loss_language).

    The ViT encodes the tokens of the visible strips alone, and those of the hidden ones alone, without gradient, as the
    latents to regress. The CNN works on the visible sites (unit `column`); the latents to regress are those of a pass
    over the whole word without gradient, which also keeps its batch norms' running statistics.
    """

    Config = MaskOCRConfig

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        own: MaskOCRConfig = config.method  # type: ignore[assignment]
        self.own, self.vit = own, is_vit(config.model)
        self.size = config.model.height, config.model.image_width
        self.rows = self.size[0] // PATCH if self.vit else 1
        channels, places = self.encoder.token_channels, self.num_frames * self.rows
        self.regressor = Regressor(channels, places, own.regressor_layers)
        patch = 3 * PATCH * (PATCH if self.vit else self.size[0])
        self.decoder = StripDecoder(channels, places, patch, own.decoder_layers)
        self.reader: nn.Module | None = None
        if own.language:
            characters = len(Charset.load(own.charset).characters)
            self.reader = Reader(channels, places, characters, own.max_length, own.language_layers)

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """The word as it is."""
        return (ViewSpec("image", "none"),)

    def masks(self, batch: Batch) -> ops.Masks:
        """Hidden strips, a function of (seed, epoch, index)."""
        return ops.draw_masks(
            batch.index, seed=self.config.seed, epoch=batch.epoch, size=self.size, unit="column",
            mask_ratio=self.own.mask_ratio, num_blocks=0,
        )  # fmt: skip

    def forward(self, batch: Batch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """See `PretrainMethod`."""
        images, masks = self.rectifier(batch.views["image"]), self.masks(batch)
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
            logits = self.reader(seen.detach() if self.own.language_frozen else seen, seen_at, unseen)
            read = read_losses(logits, batch.drawn["targets"], batch.drawn["lengths"]).mean()
            loss = loss + self.own.language_weight * read
            terms["loss_language"] = read.detach()
            if monitor:
                watched["accuracy"] = right_words(logits, batch.drawn["targets"], batch.drawn["lengths"])
        if monitor:
            watched |= {
                "spread": spread(F.normalize(full_precision(seen.detach()).mean(1), dim=1)),
                "detail": detail(prediction.detach(), target, masks.pixels),
            }  # fmt: skip
        if pictures:
            shown, hidden = to_pixels(images), masks.pixels[:PICTURES]
            guess = prediction[:PICTURES].detach().float().clamp(0, 1)
            sheet = {"masked": shown.masked_fill(hidden, 0.5), "reconstruction": guess.where(hidden, shown)}
        return StepOutput(loss, terms | {"loss": loss.detach()}, watched, sheet)

    def encode_tokens(self, images: Tensor, masks: ops.Masks) -> tuple[Tensor, Tensor, None, Tensor, Tensor, Tensor]:
        """The ViT's latents of visible strips, their places, None, latents of hidden ones, their places, ones."""
        grid = masks.grid.expand(-1, self.rows, -1).flatten(1)
        hidden = int(self.own.mask_ratio * masks.grid.shape[2]) * self.rows
        order = torch.argsort(grid.byte(), dim=1, stable=True, descending=True)
        wanted_at, seen_at = order[:, :hidden], order[:, hidden:]
        seen = self.encoder.part(images, seen_at)
        with torch.no_grad():
            wanted = self.encoder.part(images, wanted_at)
        return seen, seen_at, None, wanted, wanted_at, torch.ones_like(wanted[..., 0])

    def encode_frames(self, images: Tensor, masks: ops.Masks) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The CNN's frames of the sparse pass, all places, the frames that saw nothing, frames of the whole word, all
        places, and 1 for each frame that saw nothing."""
        seen, active = self.encoder.forward_masked(images, masks, "anchored")
        with torch.no_grad():
            wanted = self.encoder.tokens(images)
        every = torch.arange(seen.shape[1], device=seen.device).expand(len(seen), -1)
        return seen, every, ~active, wanted, every, (~active).to(full_precision(seen).dtype)

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
