"""DiG: reading by contrast and writing by reconstruction through one ViT (Yang et al., ACM MM 2022)."""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from rcmstr_fast import models, ops
from rcmstr_fast.config import MethodConfig, PretrainConfig, num_frames
from rcmstr_fast.fields import number
from rcmstr_fast.methods.parts.heads import Instances, build_head, check_windows
from rcmstr_fast.methods.parts.in_batch import check_negatives, unit_rows
from rcmstr_fast.methods.parts.masking import MaskedImageModelling, MaskSettings, hidden
from rcmstr_fast.methods.parts.momentum import Momentum, MomentumSettings
from rcmstr_fast.methods.parts.monitors import detail, pair_accuracy, spread
from rcmstr_fast.methods.protocol import Batch, Collectives, Pass, PretrainMethod, StepOutput, ViewSpec, in_passes
from rcmstr_fast.methods.registry import VIT, register


@dataclass
class DiGConfig(MethodConfig, MaskSettings, MomentumSettings):
    """DiG: a masked plain view and an augmented view, both through online and momentum network, without a queue.

    Attributes:
        name: dig.
        num_blocks: hidden blocks of 16 pixels, full height; 0: the patch mask alone.
        momentum: momentum m of the key network at the beginning.
        momentum_ramp: none (m stays) or cosine (m rises to 1 by a half cosine over the run).
        windows: windows of columns an image, each an instance.
        temperature: of the similarities; the loss is multiplied by its double.
        label_smoothing: share of each target that is spread evenly over all candidates; the released command has none.
        pixel_weight: weight of loss_mim.
        contrast_weight: weight of loss_contrast.
    """

    name: str = "dig"
    num_blocks: int = number(0, low=0, high=64)
    momentum: float = number(0.99, low=0, high=1)
    momentum_ramp: Literal["none", "cosine"] = "cosine"
    windows: int = number(4, low=1)
    temperature: float = number(0.2, above=0)
    label_smoothing: float = number(0.0, low=0, below=1)
    pixel_weight: float = number(1.0, low=0)
    contrast_weight: float = number(0.1, low=0)

    def fill(self, run: PretrainConfig) -> None:
        """The encoder has no final norm."""
        if run.model.final_norm is None:
            run.model.final_norm = False

    def check(self, run: PretrainConfig) -> None:
        """No more windows than columns, and negatives."""
        check_windows(self.name, self.windows, run.model)
        check_negatives(self, run)


class DiGNetwork(nn.Module):
    """Rectifier, encoder, windows and projector: what the online and the momentum side share.

    Args:
        config: resolved.
    """

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.rectifier = models.build_rectifier(config.model)
        self.encoder = models.build_encoder(config.model)
        self.windows = Instances("window", num_frames(config.model), cast(DiGConfig, config.method).windows)
        self.projector = models.build_projector(config.model, self.encoder.out_channels)

    def rectify(self, *views: Tensor) -> tuple[Tensor, ...]:
        """Views `[B, 3, H, W]`, rectified; batch norm sees them one by one."""
        return in_passes(self.rectifier, self.rectifier, *views)

    def project(self, *frames: Tensor) -> tuple[Tensor, ...]:
        """Frames `[B, T, C]` of each view to projected windows `[B, n, D]`; batch norm sees the views one by one."""
        return in_passes(lambda x: self.projector(self.windows(x)), self.projector, *frames)


@register(
    paper="Reading and Writing: DiG (Yang et al., ACM MM 2022)",
    encoders=VIT,
    needs=("momentum", "masks", "negatives of the batch"),
    accumulates=False,
    tiny={"bn_group_size": 2, "windows": 2, "momentum": 0.9},
)
class DiG(PretrainMethod):
    """loss = pixel_weight * loss_mim + contrast_weight * loss_contrast.

    loss_contrast is 2 t times the sum of two InfoNCE: the windows of the masked view against the keys of the augmented
    one, and the reverse. The keys of all images of all processes are the candidates, those of other windows of the same
    image among them. The momentum network sees the plain view under the same masks.
    """

    Config = DiGConfig

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        self.settings = cast(DiGConfig, config.method)
        model = config.model
        self.online = DiGNetwork(config)
        self.online.encoder.checkpointing = config.train.checkpoint_activations
        self.momentum = Momentum(self.online, self.settings)
        self.predictor = build_head(
            "mlp", model.feature_dim, model.feature_dim, hidden=model.projector_hidden, last_norm=True, bias=False
        )
        self.mim = MaskedImageModelling(config, self.online.encoder)

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """The resized image, which is masked, and the augmented one, which is not."""
        return ViewSpec("plain", "none"), ViewSpec("augmented", "dig")

    def exported(self) -> dict[str, nn.Module]:
        """Encoder and rectifier of the online network."""
        return {"encoder": self.online.encoder, "rectifier": self.online.rectifier}

    def compile_networks(self) -> None:
        """The dense passes of both encoders."""
        for network in (self.online, self.momentum.network):
            network.encoder.compile(dynamic=False)

    def begin_step(self, progress: Tensor | None = None) -> None:
        """Move the momentum network."""
        self.momentum.update(self.online, progress)

    @classmethod
    def passes(cls, config: PretrainConfig) -> tuple[Pass, ...]:
        """The masked and the augmented view, through both networks."""
        masked = hidden(cast(MaskSettings, config.method))
        return Pass(hidden=masked), Pass(), Pass(trained=False, hidden=masked), Pass(trained=False)

    def forward(self, batch: Batch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """See `PretrainMethod`."""
        own, encoder = self.settings, self.online.encoder
        plain, augmented = self.online.rectify(batch.views["plain"], batch.views["augmented"])
        masks = self.mim.masks(batch)
        loss_mim, prediction, tokens = self.mim(encoder, plain, batch, masks, self.collectives)
        projected = self.online.project(encoder.masked_frames(tokens), encoder(augmented))
        queries = [unit_rows(x) for x in in_passes(self.predictor, self.predictor, *projected)]
        keys = self._keys(batch, masks)
        contrast = self._info_nce(queries[0], keys[1]) + self._info_nce(queries[1], keys[0])
        loss = own.pixel_weight * loss_mim + own.contrast_weight * contrast
        watched: dict[str, Tensor] = {}
        if monitor:
            rows, target = queries[0].detach(), self.mim.target(plain, masks)
            watched = {"spread": spread(rows), "accuracy": pair_accuracy(rows, keys[1])}
            watched["detail"] = detail(prediction.detach(), target, masks.pixels)
        terms = {"loss_mim": loss_mim.detach(), "loss_contrast": contrast.detach()}
        return StepOutput(loss, terms, watched, self.mim.pictures(plain, masks, prediction) if pictures else {})

    @torch.no_grad()
    def _keys(self, batch: Batch, masks: ops.Masks) -> list[Tensor]:
        """Unit keys `[B n, D]` of the masked plain view and of the augmented one."""
        network = self.momentum.network
        plain, augmented = network.rectify(batch.views["plain"], batch.views["augmented"])
        tokens, _ = network.encoder.forward_masked(plain, masks, self.settings.mask_rule)
        frames = network.encoder.masked_frames(tokens), network.encoder(augmented)
        return [unit_rows(x) for x in network.project(*frames)]

    def _info_nce(self, query: Tensor, key: Tensor) -> Tensor:
        """2 t times the cross entropy of each query among the keys of all processes."""
        first = self.collectives.rank * len(query)
        positive = torch.arange(first, first + len(query), device=query.device)
        candidates, t = self.collectives.gather(key), self.settings.temperature
        loss = ops.info_nce(query, candidates, positive, temperature=t)
        if smoothing := self.settings.label_smoothing:
            # The mean similarity to all candidates is the one to their mean: no matrix of them all is needed.
            spread_over = (query * (candidates[positive] - candidates.mean(0))).sum(1).mean() / t
            loss = loss + smoothing * spread_over
        return 2 * t * loss
