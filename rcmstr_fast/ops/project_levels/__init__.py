"""Projected frames to unit rows of each level: pooling, the level's linear layer and L2 normalisation in one."""

from collections.abc import Mapping

from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.ops import checks
from rcmstr_fast.ops.dispatch import operation, register_triton
from rcmstr_fast.ops.permutation import check_order
from rcmstr_fast.ops.project_levels import reference, triton
from rcmstr_fast.ops.project_levels.triton import LEVELS

_NAME = "project_levels"
_project_levels = operation(_NAME, reference.project_levels)
register_triton(_project_levels, triton.project_levels, triton.reasons)


def project_levels(
    frames: Tensor,
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    num_subwords: int,
    *,
    order: Tensor | None = None,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Unit rows of each level: `hierarchical_pool`, then the level's linear layer, then division by the L2 norm.

    Args:
        frames: [B, T, C] floating point; projected frames. Receives a gradient.
        weights: level ("frame", "subword", "word") -> [D, C] floating point. Receive gradients.
        biases: the same levels -> [D]. Receive gradients.
        num_subwords: S, 1 to T.
        order: [B, N] int64 as from `draw_order`, T % N == 0; undoes the permutation before pooling.
        backend: None (automatic), "reference" or "triton".
    Returns:
        level -> [B * rows, D] unit rows with T, S or 1 rows an image, float32 (float64 for float64 frames). Autocast
        reaches the linear layer only. A row of norm below 1e-12 is divided by 1e-12.
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a level is unknown, shapes or devices disagree, S is outside 1..T, N does not divide T.
    """
    checks.check_tensor(_NAME, "frames", frames, ("B", "T", "C"))
    if not weights or list(weights) != [level for level in LEVELS if level in weights] or set(biases) != set(weights):
        raise ValueError(
            f"{_NAME}: weights and biases must have the same levels out of {', '.join(LEVELS)}, in this order, "
            f"got {', '.join(weights) or 'none'} and {', '.join(biases) or 'none'}"
        )
    width = None
    for level, weight in weights.items():
        checks.check_tensor(_NAME, f"weights[{level!r}]", weight, (width or "D", frames.shape[2]), like="frames")
        width = weight.shape[0]
        checks.check_tensor(_NAME, f"biases[{level!r}]", biases[level], (width,), like=f"weights[{level!r}]")
        checks.check_devices(
            _NAME, frames=frames, **{f"weights[{level!r}]": weight, f"biases[{level!r}]": biases[level]}
        )
    if not 1 <= num_subwords <= frames.shape[1]:
        raise ValueError(f"{_NAME}: num_subwords must be in 1..{frames.shape[1]}, got {num_subwords}")
    if order is not None:
        checks.check_tensor(_NAME, "order", order, (frames.shape[0], "N"), "int64", like="frames")
        checks.check_divides(_NAME, "N of order", order.shape[1], "the number of frames", frames.shape[1])
        checks.check_devices(_NAME, frames=frames, order=order)
        if env.debug():
            check_order(_NAME, order, frames.shape[0])
    return _project_levels(frames, weights, biases, num_subwords, order=order, backend=backend)
