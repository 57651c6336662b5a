"""Frame, subword and word features of a sequence of frames."""

from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.ops import checks
from rcmstr_fast.ops.dispatch import operation, register_triton
from rcmstr_fast.ops.hierarchical_pool import reference, triton
from rcmstr_fast.ops.hierarchical_pool.reference import HierarchicalFeatures as HierarchicalFeatures
from rcmstr_fast.ops.permutation import check_order

_hierarchical_pool = operation("hierarchical_pool", reference.hierarchical_pool)
register_triton(_hierarchical_pool, triton.hierarchical_pool, triton.reasons)
_NAME = "hierarchical_pool"


def hierarchical_pool(
    frames: Tensor, num_subwords: int, *, order: Tensor | None = None, backend: str | None = None
) -> HierarchicalFeatures:
    """Features of the three levels: frames, averages over overlapping windows, average over all frames.

    Subword s of S is the mean of frames floor(s T / S) .. ceil((s + 1) T / S) - 1 (adaptive average pooling):
    over 26 frames and 4 subwords [0, 7) [6, 13) [13, 20) [19, 26).

    Args:
        frames: [B, T, C] floating point.
        num_subwords: S, 1 to T.
        order: [B, N] int64 as from `draw_order`, T % N == 0; undoes the permutation before pooling.
        backend: None (automatic), "reference" or "triton".
    Returns:
        `frame` [B, T, C] (order undone), `subword` [B, S, C], `word` [B, 1, C], in the dtype of `frames`.
    Raises:
        TypeError: a tensor of another dtype, S is no int.
        ValueError: S outside 1..T, N does not divide T, shapes or devices disagree.
    """
    checks.check_tensor(_NAME, "frames", frames, ("B", "T", "C"))
    checks.check_whole(_NAME, num_subwords=num_subwords)
    if not 1 <= num_subwords <= frames.shape[1]:
        raise ValueError(f"{_NAME}: num_subwords must be in 1..{frames.shape[1]}, got {num_subwords}")
    if order is not None:
        checks.check_tensor(_NAME, "order", order, (frames.shape[0], "N"), "int64", like="frames")
        checks.check_divides(_NAME, "N of order", order.shape[1], "the number of frames", frames.shape[1])
        checks.check_devices(_NAME, frames=frames, order=order)
        if env.debug():
            check_order(_NAME, order, frames.shape[0])
    return _hierarchical_pool(frames, num_subwords, order=order, backend=backend)
