"""PerSec (Liu et al., AAAI 2022), after its description; there is no public code, and sizes are ours.

Two context perceivers look at one encoder: strokes at an early layer, each within a window, and semantics at its end,
each over the whole word. At both some positions are hidden, and each must be told by its context from the same position
of the other images of the batch; targets are quantised with learned codes. What a quantiser, its noise and the losses
are follows wav2vec 2.0, with two departures, without which the encoder finds something easier to tell than text. Rivals
are not other positions of the same image, which a code for the position alone tells apart. Targets come from a second
view, since what one view shares, such as its colours or its slant, tells it from the others.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast import random
from rcmstr_fast.config import MethodConfig, PretrainConfig, is_vit, num_frames, require
from rcmstr_fast.fields import number
from rcmstr_fast.methods.base import EncoderMethod
from rcmstr_fast.methods.parts.context import ContextPerceiver, gumbel, told_apart, unused
from rcmstr_fast.methods.parts.in_batch import check_negatives
from rcmstr_fast.methods.parts.monitors import spread
from rcmstr_fast.methods.protocol import PICTURES, Batch, Collectives, StepOutput, ViewSpec, to_pixels
from rcmstr_fast.methods.registry import register
from rcmstr_fast.models.batch_norm import batch_norm_state, norms_of
from rcmstr_fast.ops.precision import full_precision

LEVELS = ("stroke", "semantic")


@dataclass
class PerSecConfig(MethodConfig):
    """PerSec: tell hidden strokes and hidden semantics by their context.

    Attributes:
        name: persec.
        stroke_layer: stages (CNN) or blocks (ViT) below the strokes; null: 3 (CNN), a quarter of the blocks (ViT).
        stroke_window: rows and columns to each side that a stroke's context has.
        context_layers: transformer layers of each perceiver.
        groups: books of codes of each quantiser.
        entries: codes a book.
        mask_ratio: hidden share of a level's positions; null: 0.5 (CNN), 0.3 (ViT, which does not see those of either).
        temperature: of the similarities.
        gumbel_start: temperature of the quantiser at the beginning of the run.
        gumbel_end: the same at its end; it falls exponentially.
        residual: targets are what is left of features without what a place has in all images and an image at all its
            places, and a new quantiser's logits have the deviation 4; null: for the ViT.
        diversity_weight: weight of the share of unused codes; null: 0.1, with `residual` 1.
        stroke_weight: weight of the strokes' losses.
        semantic_weight: weight of the semantics' losses.
        augment: preset of the view.
    """

    name: str = "persec"
    stroke_layer: int | None = number(None, low=1)
    stroke_window: int = number(3, low=1)
    context_layers: int = number(1, low=1, high=24)
    groups: int = number(2, low=1)
    entries: int = number(64, low=2)
    mask_ratio: float | None = number(None, above=0, high=1)
    temperature: float = number(0.1, above=0)
    gumbel_start: float = number(2.0, above=0)
    gumbel_end: float = number(0.5, above=0)
    residual: bool | None = None
    diversity_weight: float | None = number(None, low=0)
    stroke_weight: float = number(1.0, low=0)
    semantic_weight: float = number(1.0, low=0)
    augment: Literal["none", "light", "pretrain"] = "pretrain"

    def fill(self, run: PretrainConfig) -> None:
        """The early layer, the hidden share and the targets by encoder."""
        if self.residual is None:
            self.residual = is_vit(run.model)
        if self.diversity_weight is None:
            self.diversity_weight = 1.0 if self.residual else 0.1
        if self.mask_ratio is None:
            self.mask_ratio = 0.3 if is_vit(run.model) else 0.5
        if self.stroke_layer is None:
            self.stroke_layer = max(1, run.model.depth // 4) if is_vit(run.model) else 3

    def check(self, run: PretrainConfig) -> None:
        """The early layer exists, books divide the codes, and there is something to tell apart."""
        check_negatives(self, run)
        layers, frames = run.model.depth if is_vit(run.model) else 6, num_frames(run.model)
        expected = f"method.stroke_layer must be at most the {layers} layers of the encoder for method {self.name}"
        require(int(self.stroke_layer or 0) <= layers, expected, self.stroke_layer)
        expected = f"method.groups must divide model.feature_dim {run.model.feature_dim} for method {self.name}"
        require(run.model.feature_dim % self.groups == 0, expected, self.groups)
        expected = f"method.mask_ratio must hide 2 or more of the {frames} frames of an image for method {self.name}"
        require(int((self.mask_ratio or 0.0) * frames) >= 2, expected, self.mask_ratio)


@register(
    paper="Perceiving Stroke-Semantic Context (Liu et al., AAAI 2022), after the description; sizes ours",
    needs=("masks", "codes"),
    accumulates=False,
    tiny={"entries": 8, "bn_group_size": 2},
)
class PerSec(EncoderMethod):
    """Weighted sum over both levels of InfoNCE and the share of unused codes."""

    Config = PerSecConfig

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        own = cast(PerSecConfig, config.method)
        self.own, self.attends = own, is_vit(config.model)
        with torch.no_grad():
            blank = torch.zeros(1, 3, config.model.height, config.model.image_width)
            self.encoder.eval()
            early, _ = self.encoder.levels(blank, int(own.stroke_layer or 1))
            self.encoder.train()
        self.sizes = {"stroke": (early.shape[2], early.shape[3]), "semantic": (1, self.num_frames)}
        channels = {"stroke": early.shape[1], "semantic": self.encoder.out_channels}
        self.perceivers = nn.ModuleDict(
            {
                level: ContextPerceiver(
                    channels[level],
                    self.sizes[level],
                    groups=own.groups,
                    entries=own.entries,
                    dim=config.model.feature_dim,
                    layers=own.context_layers,
                    window=own.stroke_window if level == "stroke" else None,
                    deviation=4.0 / channels[level] ** 0.5 if own.residual else 1.0,
                )
                for level in LEVELS
            }
        )

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """Two views of one preset: what is told and what tells it."""
        preset = cast(PerSecConfig, config.method).augment
        return ViewSpec("one", preset), ViewSpec("two", preset)

    def forward(self, batch: Batch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """See `PretrainMethod`."""
        images = batch.views["one"]
        draws = {level: self.draws(level, batch, images.dtype) for level in LEVELS}
        seen, told_of = self._maps(images, batch.views["two"], self._unseen(*(draws[level][0] for level in LEVELS)))
        losses: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        watched: dict[str, Tensor] = {}
        sheet: dict[str, Tensor] = {}
        for level, weight in zip(LEVELS, (self.own.stroke_weight, self.own.semantic_weight), strict=True):
            hidden, noise = draws[level]
            perceiver = cast(ContextPerceiver, self.perceivers[level])
            contexts = perceiver(seen[level], hidden)
            targets, codes, probabilities = perceiver.targets(
                self._rest(told_of[level]) if self.own.residual else told_of[level],
                hidden,
                noise,
                self.gumbel_temperature(batch.progress),
            )
            told, right = told_apart(
                contexts,
                hidden,
                self.collectives.gather_with_grad(targets),
                self.collectives.gather(hidden),
                first=self.collectives.rank * len(hidden),
                size=seen[level].shape[1],
                temperature=self.own.temperature,
            )
            mean = self.collectives.gather_with_grad(probabilities.mean((0, 1))[None]).mean(0)
            told, spare = told.mean(), unused(mean)
            losses.append(weight * (told + float(self.own.diversity_weight or 0.0) * spare))
            terms |= {f"loss_{level}": told.detach(), f"loss_{level}_codes": spare.detach()}
            if monitor:
                entry = torch.arange(self.own.entries, device=codes.device)
                used = (codes[..., None] == entry).to(mean.dtype).mean((0, 1))
                watched |= {f"accuracy_{level}": right.float().mean(), f"codes_{level}": 1.0 - unused(used)}
            if pictures:
                sheet[f"{level} hidden"] = self._covered(images, hidden, level)
        loss = torch.stack(losses).sum()
        if monitor:
            watched["spread"] = spread(F.normalize(full_precision(seen["semantic"].detach()).mean(1), dim=1))
        return StepOutput(loss, terms | {"loss": loss.detach()}, watched, sheet)

    def _unseen(self, strokes: Tensor, frames: Tensor) -> Tensor | None:
        """[B, N] bool, the tokens that a ViT must not see for positions [B, M] of each level to be hidden; a CNN: None.

        Attention would carry what is hidden to every other place, where a context finds it; a convolution has its window.
        """
        if not self.attends:
            return None
        height, width = self.sizes["stroke"]
        blank = torch.zeros(len(strokes), height * width, dtype=torch.bool, device=strokes.device)
        columns = blank[:, :width].scatter(1, frames, True)
        return blank.scatter(1, strokes, True) | columns.repeat(1, height)

    def _maps(self, one: Tensor, two: Tensor, unseen: Tensor | None) -> tuple[dict[str, Tensor], ...]:
        """Strokes [B, N, C] and semantics [B, T, C] of each view, the first one without what is `unseen`."""
        views = one, two
        hidden = None if unseen is None else torch.cat([unseen, torch.zeros_like(unseen)])

        def both(images: Tensor) -> tuple[Tensor, Tensor]:
            early, tokens = self.encoder.levels(self.rectifier(images), int(self.own.stroke_layer or 1), hidden)
            return early.flatten(2).transpose(1, 2), self.encoder.masked_frames(tokens)

        with batch_norm_state(norms_of(self), passes=len(views)):
            strokes, semantics = (x.chunk(len(views)) for x in both(torch.cat(views)))
        return tuple(dict(zip(LEVELS, maps, strict=True)) for maps in zip(strokes, semantics, strict=True))

    def _rest(self, x: Tensor) -> Tensor:
        """Features [B, N, C] less what a place has in all images and an image at all places, of unit variance.

        Both tell an image from the others, or a place, without a stroke of text; places count over all processes.
        """
        x = full_precision(x)
        x = x - self.collectives.gather_with_grad(x.mean(0, keepdim=True)).mean(0)
        x = x - x.mean(1, keepdim=True)
        variance = self.collectives.gather_with_grad(x.square().mean((0, 1))[None]).mean(0)
        return x * (variance + 1e-5).rsqrt()

    def gumbel_temperature(self, progress: Tensor | None) -> Tensor | float:
        """From `gumbel_start` to `gumbel_end`, exponentially in the share of the run that is done."""
        start, end = self.own.gumbel_start, self.own.gumbel_end
        return start if progress is None else start * (end / start) ** progress

    def draws(self, level: str, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Hidden positions [B, M] and noise [B, M, G, V] of a level."""
        own, (height, width), offset = self.own, self.sizes[level], LEVELS.index(level)
        count = int((own.mask_ratio or 0.0) * height * width)

        def words(stream: int, each: int) -> Tensor:
            return random.words(batch.index, each, seed=self.config.seed, stream=stream + offset, epoch=batch.epoch)

        hidden = random.permutation(words(random.CONTEXT, height * width))[:, :count]
        precise = dtype if dtype == torch.float64 else torch.float32
        noise = gumbel(words(random.GUMBEL, count * own.groups * own.entries), precise)
        return hidden, noise.unflatten(1, (count, own.groups, own.entries))

    def _covered(self, images: Tensor, hidden: Tensor, level: str) -> Tensor:
        """The images with what is hidden at a level in grey."""
        height, width = self.sizes[level]
        grid = torch.zeros(len(hidden), height * width, device=hidden.device).scatter(1, hidden, 1.0)
        cover = F.interpolate(grid[:PICTURES].unflatten(1, (1, height, width)), images.shape[2:]) > 0
        return to_pixels(images).masked_fill(cover, 0.5)
