"""Pooling, linear projection and normalisation of every level in plain PyTorch."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import linear, normalize

from rcmstr_fast.ops.hierarchical_pool.reference import hierarchical_pool


def project_levels(
    frames: Tensor,
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    num_subwords: int,
    *,
    order: Tensor | None = None,
) -> dict[str, Tensor]:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.project_levels`."""
    pooled = hierarchical_pool(frames, num_subwords, order=order)
    rows = {level: linear(getattr(pooled, level), weights[level], biases[level]) for level in weights}
    return {
        level: normalize(x.float() if x.element_size() < 4 else x, dim=-1).flatten(0, 1) for level, x in rows.items()
    }
