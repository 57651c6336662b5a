"""iBOT: a teacher's view of whole words and of hidden patches is what the student predicts (Zhou et al., ICLR 2022)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from rcmstr_fast import models, ops
from rcmstr_fast.config import MethodConfig, PretrainConfig, Training, require
from rcmstr_fast.fields import number
from rcmstr_fast.methods.parts.blocks import block_masks, hidden_tokens
from rcmstr_fast.methods.parts.distillation import Centre, PrototypeHead, cross_entropy
from rcmstr_fast.methods.parts.momentum import Momentum, MomentumSettings
from rcmstr_fast.methods.parts.monitors import entropy, spread
from rcmstr_fast.methods.protocol import (
    PICTURES,
    Batch,
    Collectives,
    Pass,
    PretrainMethod,
    StepOutput,
    ViewSpec,
    in_passes,
    to_pixels,
)
from rcmstr_fast.methods.registry import VIT, register
from rcmstr_fast.models.encoder import Features
from rcmstr_fast.models.transformer import PATCH
from rcmstr_fast.models.vit import VisionTransformer, drop_paths
from rcmstr_fast.ops.augment_views import PRESETS


@dataclass
class IBOTConfig(MethodConfig, MomentumSettings):
    """iBOT: self-distillation of the global token and of hidden patch tokens.

    The global token is the class token; with model.class_token=false it is the mean of the patch tokens.

    Attributes:
        name: ibot.
        momentum: momentum m of the teacher at the beginning.
        momentum_ramp: none (m stays) or cosine (m rises to 1 by a half cosine over the run).
        mask_ratio: share of the patch tokens that rectangles hide from the student.
        head_hidden: width of the head's two middle layers.
        bottleneck: channels before the last layer.
        prototypes: outputs of the last layer.
        tau_student: temperature of the student.
        tau_global: temperature of the teacher's global token.
        tau_patch: temperature of the teacher's patch tokens, reached after tau_rise.
        tau_patch_start: the same at the beginning.
        tau_rise: share of the run in which it rises (30 of 100 epochs).
        centre_momentum: share of a centre that stays at each step.
        global_weight: weight of loss_global.
        patch_weight: weight of loss_patch.
        frozen_epochs: epochs in which the last layer gets no gradient.
        local_crops: small crops of half the height and width, seen by the student alone; 0: no multi-crop.
        local_area: largest share of the picture in a small crop.
        drop_path: chance with which a branch of the student's last block is left out for an image (stochastic depth);
            it grows linearly from 0 in the first block.
        kept: the network that is exported.
    """

    vit = Training(batch=1024, epochs=10, lr=5e-4, weight_decay=0.04, min_lr=1e-6, clip=3.0)
    name: str = "ibot"
    momentum: float = number(0.996, low=0, high=1)
    momentum_ramp: Literal["none", "cosine"] = "cosine"
    mask_ratio: float = number(0.3, above=0, high=1)
    head_hidden: int = number(2048, low=1)
    bottleneck: int = number(256, low=1)
    prototypes: int = number(8192, low=2)
    tau_student: float = number(0.1, above=0)
    tau_global: float = number(0.04, above=0)
    tau_patch: float = number(0.07, above=0)
    tau_patch_start: float = number(0.04, above=0)
    tau_rise: float = number(0.3, low=0, high=1)
    centre_momentum: float = number(0.9, low=0, below=1)
    global_weight: float = number(1.0, low=0)
    patch_weight: float = number(1.0, low=0)
    frozen_epochs: int = number(1, low=0)
    local_crops: int = number(0, low=0, high=16)
    local_area: float = number(0.14, above=0.05, high=1)
    drop_path: float = number(0.0, low=0, below=1)
    kept: Literal["teacher", "student"] = "teacher"

    def fill(self, run: PretrainConfig) -> None:
        """The global token is a class token unless the user says otherwise."""
        if run.model.class_token is None:
            run.model.class_token = True

    def check(self, run: PretrainConfig) -> None:
        """What is learned comes before a sequence model; small crops are not rectified and have whole tokens."""
        model = run.model
        require(model.sequence == "none", f"model.sequence must be none for method {self.name}", model.sequence)
        if self.local_crops:
            require(model.tps == "none", f"model.tps must be none for method {self.name} with local_crops", model.tps)
            expected = f"model.image_width must be a multiple of 8 for method {self.name} with local_crops"
            require(model.image_width % (2 * PATCH) == 0, expected, model.image_width)


class IBOTNetwork(nn.Module):
    """Rectifier, encoder and head: what student and teacher share.

    Args:
        config: resolved.
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.rectifier = models.build_rectifier(config.model)
        self.encoder = models.build_encoder(config.model)
        own = cast(IBOTConfig, config.method)
        self.head = PrototypeHead(self.encoder.token_channels, own.head_hidden, own.bottleneck, own.prototypes)

    def rectify(self, one: Tensor, two: Tensor) -> Tensor:
        """Both views `[B, 3, H, W]` as one batch `[2 B, 3, H, W]`, rectified."""
        return torch.cat(in_passes(self.rectifier, self.rectifier, one, two))


def global_token(found: Features) -> Tensor:
    """`[B, C]`: the class token, or the mean of the others where there is none."""
    return found.tokens.mean(1) if found.class_token is None else found.class_token


@register(
    paper="iBOT (Zhou et al., ICLR 2022)",
    encoders=VIT,
    needs=("momentum", "masks", "class token"),
    tiny={"head_hidden": 16, "bottleneck": 8, "prototypes": 12, "momentum": 0.9},
)
class IBOT(PretrainMethod):
    """loss = global_weight * loss_global + patch_weight * loss_patch.

    loss_global: the student's global token of a (masked) view predicts the teacher's of the other view. loss_patch: its
    hidden patch tokens predict the teacher's of the same view, a mean over the hidden tokens of each image. The teacher
    sees whole views; its scores are centred, the centres follow the mean scores of all processes after each step.
    """

    Config = IBOTConfig

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        self.settings = cast(IBOTConfig, config.method)
        self.student = IBOTNetwork(config)
        self.student.encoder.checkpointing = config.train.checkpoint_activations
        self.teacher = Momentum(self.student, self.settings)
        self.centres = nn.ModuleDict(
            {
                name: Centre(self.settings.prototypes, self.settings.centre_momentum, collectives)
                for name in ("global", "patch")
            }
        )
        self.limit = hidden_tokens(_grid(config), self.settings.mask_ratio)

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """Two large crops, which are not flipped, and the small ones."""
        own = cast(IBOTConfig, config.method)
        large = ViewSpec("one", "ibot"), ViewSpec("two", "ibot")
        if not own.local_crops:
            return large
        first = PRESETS["ibot"][0]  # type: ignore[index]
        chances = tuple((name, 0.5 if name == "blur" else chance) for name, chance in first.operations)
        preset = dataclasses.replace(first, operations=chances, resized_area=(0.05, own.local_area))
        size = config.model.height // 2, config.model.image_width // 2
        return (*large, *(ViewSpec(f"local{i}", preset, size) for i in range(own.local_crops)))

    @classmethod
    def draw(cls, config: PretrainConfig, index: Tensor, epoch: int) -> dict[str, Tensor]:
        """Which tokens of each large crop are hidden, `masks` [B, 2, H/4, W/4], and `paths` of `drop_paths`, if any."""
        own = cast(IBOTConfig, config.method)
        masks = block_masks(index, seed=config.seed, epoch=epoch, grid=_grid(config), ratio=own.mask_ratio)
        if not own.drop_path:
            return {"masks": masks}
        views, depth = 2 + own.local_crops, config.model.depth
        paths = drop_paths(index, seed=config.seed, epoch=epoch, views=views, depth=depth, rate=own.drop_path)
        return {"masks": masks, "paths": paths}

    def exported(self) -> dict[str, nn.Module]:
        """Encoder and rectifier of the network that is kept."""
        network = self.teacher.network if self.settings.kept == "teacher" else self.student
        return {"encoder": network.encoder, "rectifier": network.rectifier}

    def begin_step(self, progress: Tensor | None = None) -> None:
        """Move the teacher."""
        for centre in self.centres.values():
            cast(Centre, centre).begin()
        self.teacher.update(self.student, progress)

    @classmethod
    def passes(cls, config: PretrainConfig) -> tuple[Pass, ...]:
        """Two views through both networks, small crops of a quarter of the picture through the student."""
        crops = cast(IBOTConfig, config.method).local_crops
        return (*[Pass()] * 2, *[Pass(trained=False)] * 2, *[Pass(share=0.25)] * crops)

    def forward(self, batch: Batch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """See `PretrainMethod`."""
        own = self.settings
        grid = batch.drawn["masks"].transpose(0, 1).flatten(0, 1)  # view by view, as the images
        hidden = grid.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
        places = torch.argsort(grid.flatten(1).to(torch.int8), dim=1, descending=True, stable=True)[:, : self.limit]
        wanted = grid.flatten(1).gather(1, places)
        teacher_global, teacher_patch = self._teach(batch, places)
        moving = torch.as_tensor(batch.epoch, device=grid.device) >= own.frozen_epochs
        head = self.student.head
        images = self.student.rectify(batch.views["one"], batch.views["two"])
        dropped = batch.drawn.get("paths")
        paths: Sequence[Tensor | None] = [None] * (1 + own.local_crops)
        if dropped is not None:
            paths = [dropped[:, :2].transpose(0, 1).flatten(0, 1), *dropped[:, 2:].unbind(1)]
        encoder = cast(VisionTransformer, self.student.encoder)
        found = encoder.features(images, ops.Masks(grid, hidden), paths=paths[0])
        rows = [head(global_token(found)), head(_picked(found.tokens, places))]
        student_patch = head.scores(rows[1], moving)
        student_global = [*head.scores(rows[0], moving).chunk(2)]
        for i in range(own.local_crops):
            crop = encoder.crop_features(batch.views[f"local{i}"], paths[1 + i])
            student_global.append(head.scores(head(global_token(crop)), moving))
        pairs = [
            cross_entropy(taught, guess / own.tau_student).mean()
            for q, taught in enumerate(teacher_global.chunk(2))
            for v, guess in enumerate(student_global)
            if v != q
        ]
        loss_global = torch.stack(pairs).mean()
        of_tokens = torch.where(wanted, cross_entropy(teacher_patch, student_patch / own.tau_student), 0.0)
        loss_patch = (of_tokens.sum(1) / wanted.sum(1).clamp(min=1)).mean()
        loss = own.global_weight * loss_global + own.patch_weight * loss_patch
        watched: dict[str, Tensor] = {}
        if monitor:
            watched = {"entropy_global": entropy(teacher_global), "entropy_patch": entropy(teacher_patch.flatten(0, 1))}
            watched |= {"spread": spread(rows[0].detach()), "peak": teacher_global.amax(-1).mean()}
        terms = {"loss_global": loss_global.detach(), "loss_patch": loss_patch.detach()}
        return StepOutput(loss, terms, watched, _pictures(images, hidden) if pictures else {})

    def end_step(self, finite: Tensor | None = None) -> None:
        """Move the centres by the mean scores of all processes and micro-batches, where the step was finite."""
        for centre in self.centres.values():
            cast(Centre, centre).move(finite)

    @torch.no_grad()
    def _teach(self, batch: Batch, places: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of the teacher: global [2 B, K], of the tokens at `places` [2 B, n, K]; notes its mean scores."""
        own, network = self.settings, self.teacher.network
        found = network.encoder.features(network.rectify(batch.views["one"], batch.views["two"]))
        head = network.head
        whole, tokens = head(global_token(found)), head(found.tokens)
        scores = head.scores(whole)
        # The last layer is linear: the mean score of all tokens is the score of their mean.
        centres = [cast(Centre, self.centres[name]) for name in ("global", "patch")]
        centres[0].note(scores.mean(0))
        centres[1].note(head.scores(tokens.flatten(0, 1).mean(0, keepdim=True))[0])
        of_tokens = head.scores(_picked(tokens, places))
        tau_patch = self._tau_patch(batch.progress)
        return (
            torch.softmax((scores - centres[0].mean) / own.tau_global, dim=-1),
            torch.softmax((of_tokens - centres[1].mean) / tau_patch, dim=-1),
        )

    def _tau_patch(self, progress: Tensor | None) -> Tensor | float:
        """Temperature of the teacher's patch tokens: linear from its start to its end, then constant."""
        own = self.settings
        if not own.tau_rise:
            return own.tau_patch
        if progress is None:
            return own.tau_patch_start
        return own.tau_patch_start + (own.tau_patch - own.tau_patch_start) * (progress / own.tau_rise).clamp(max=1.0)


def _grid(config: PretrainConfig) -> tuple[int, int]:
    """Tokens (rows, columns) of an image."""
    return config.model.height // PATCH, config.model.image_width // PATCH


def _picked(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens [B, N, C] at places [B, n]: [B, n, C]."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))


def _pictures(images: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """Both large crops as the student sees them."""
    sheet = {}
    for name, view, mask in zip(("one masked", "two masked"), images.chunk(2), hidden.chunk(2), strict=True):
        sheet[name] = to_pixels(view).masked_fill(mask[:PICTURES], 0.5)
    return sheet
