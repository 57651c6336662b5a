"""The network that query and key share: rectifier, encoder, projector, one predictor a level."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast import models, ops
from rcmstr_fast.config import ModelConfig
from rcmstr_fast.methods.parts.momentum import Momentum
from rcmstr_fast.methods.permutation import PermutedQuery
from rcmstr_fast.models.batch_norm import batch_norm_state, norms_of, set_bn_groups
from rcmstr_fast.ops.precision import full_precision


class Network(nn.Module):
    """Online or momentum network of RCMSTR: images to L2-normalised rows a level.

    Args:
        model: the architecture.
        levels: levels with a predictor.
        bn_group_size: images that share batch-norm statistics; 0: the batch.
    """

    def __init__(self, model: ModelConfig, levels: list[str], bn_group_size: int) -> None:
        super().__init__()
        self.rectifier = models.build_rectifier(model)
        self.encoder = models.build_encoder(model)
        self.projector = models.build_projector(model, self.encoder.out_channels)
        self.predictors = nn.ModuleDict({level: models.build_predictor(model) for level in levels})
        set_bn_groups(self, bn_group_size)

    def compile_parts(self) -> None:
        """Let torch.compile have the dense passes of encoder and projector; LSTMs stay as they are (cuDNN's own)."""
        for part in (self.encoder, self.projector):
            if not any(isinstance(layer, nn.LSTM) for layer in part.modules()):
                part.compile(dynamic=False)

    def rectify(self, images: Tensor, passes: int = 1) -> Tensor:
        """Images `[B, 3, H, W]` to rectified images; `passes` as in `encode`."""
        return _in_passes(self.rectifier, images, passes)

    def encode(self, images: Tensor, passes: int = 1) -> Tensor:
        """Rectified images `[B, 3, H, W]` to frames `[B, T, C]` of the encoder.

        Args:
            images: `passes` equal parts, one after the other.
            passes: batch norm works as if each part were passed on its own.
        """
        return _in_passes(self.encoder, images, passes)

    def project(self, frames: Tensor, passes: int = 1) -> Tensor:
        """Frames of the encoder to projected frames `[B, T, P]`; `passes` as in `encode`."""
        return _in_passes(self.projector, frames, passes)

    def frames(self, images: Tensor, passes: int = 1) -> Tensor:
        """Rectified images `[B, 3, H, W]` to projected frames `[B, T, P]`; `passes` as in `encode`."""
        return self.project(self.encode(images, passes), passes)

    def unit_rows(self, frames: Tensor, num_subwords: int, order: Tensor | None = None) -> dict[str, Tensor]:
        """Projected frames `[B, T, P]` to unit rows: level -> `[B * rows, D]` float32; `order` undoes a permutation."""
        linear = {level: p.linear for level, p in self.predictors.items() if isinstance(p, models.LinearPredictor)}
        if len(linear) < len(self.predictors):
            return self.features(ops.hierarchical_pool(frames, num_subwords, order=order))
        weights, biases = ({level: getattr(p, n) for level, p in linear.items()} for n in ("weight", "bias"))
        return ops.project_levels(frames, weights, biases, num_subwords, order=order)

    def permuted_rows(self, query: PermutedQuery, frames: Tensor) -> dict[str, Tensor]:
        """Projected frames `[B, T, P]` of the permuted images to unit rows a level, in the images' own order."""
        if query.method.division == "direct":
            return self.unit_rows(frames, query.method.num_subwords, order=query.order)
        return self.features(query.pool(frames))

    def features(self, pooled: ops.HierarchicalFeatures) -> dict[str, Tensor]:
        """Pooled features to unit rows: level -> `[B * rows, D]` float32."""
        rows = {level: predictor(getattr(pooled, level)) for level, predictor in self.predictors.items()}
        return {level: F.normalize(full_precision(x), dim=-1).flatten(0, 1) for level, x in rows.items()}


def _in_passes(part: nn.Module, x: Tensor, passes: int) -> Tensor:
    with batch_norm_state(norms_of(part), passes=passes):
        return part(x)


class MomentumNetwork(Momentum[Network]):
    """The momentum network that gives the keys."""

    @torch.no_grad()
    def forward(self, images: Tensor, num_subwords: int, grouping: Tensor | None) -> dict[str, Tensor]:
        """Keys of each level.

        Args:
            images: [B, 3, H, W]; the key view.
            num_subwords: S.
            grouping: [B] int64 permutation that decides who shares batch-norm statistics, or None.
        Returns:
            level -> [B * rows, D] float32 unit rows in the order of `images`.
        """
        if grouping is not None:
            images = images[grouping]
        keys = self.network.unit_rows(self.network.frames(self.network.rectify(images)), num_subwords)
        if grouping is None:
            return keys
        back = torch.argsort(grouping)
        return {level: rows.unflatten(0, (len(back), -1))[back].flatten(0, 1) for level, rows in keys.items()}
