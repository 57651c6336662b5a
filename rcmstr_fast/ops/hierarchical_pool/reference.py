"""Frame, subword and word features in plain PyTorch."""

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from rcmstr_fast.ops.permutation.reference import restore_frames


class HierarchicalFeatures(NamedTuple):
    """`frame` [B, T, C], `subword` [B, S, C] and `word` [B, 1, C] features."""

    frame: Tensor
    subword: Tensor
    word: Tensor


def hierarchical_pool(frames: Tensor, num_subwords: int, *, order: Tensor | None = None) -> HierarchicalFeatures:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.hierarchical_pool`."""
    if order is not None:
        frames = restore_frames(frames, order, num_patches=order.shape[1], group_size=1)
    subword = adaptive_avg_pool1d(frames.transpose(1, 2), num_subwords).transpose(1, 2)
    return HierarchicalFeatures(frames, subword, frames.mean(dim=1, keepdim=True))
