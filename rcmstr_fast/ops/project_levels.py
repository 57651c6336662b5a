"""Projected frames to unit rows of each level: pooling, the level's linear layer and L2 normalisation in one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.ops import checks, reference, triton_backend
from rcmstr_fast.ops.dispatch import operation, register
from rcmstr_fast.ops.permutation import check_order

LEVELS = ("frame", "subword", "word")
_NAME = "project_levels"
_project_levels = operation(_NAME, reference.project_levels)


def _counts(frames: Tensor, num_subwords: int, levels: list[int]) -> list[int]:
    """Rows of each of `levels`."""
    batch, length, _ = frames.shape
    return [(batch * length, batch * num_subwords, batch)[level] for level in levels]


@torch.library.custom_op("rcmstr_fast::project_levels", mutates_args=())
def _project(
    frames: Tensor, weights: list[Tensor], biases: list[Tensor], levels: list[int], num_subwords: int,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Unit rows of all levels [R, D] float32, 1 / norm [R], averages of subwords and words."""
    from rcmstr_fast.kernels.project_levels import project_levels_fwd

    return project_levels_fwd(frames, weights, biases, levels, num_subwords, order)


@_project.register_fake
def _(frames, weights, biases, levels, num_subwords, order):  # type: ignore[no-untyped-def]
    counts = _counts(frames, num_subwords, levels)
    pooled = sum(count for count, level in zip(counts, levels) if level)
    rows = frames.new_empty(sum(counts), weights[0].shape[0], dtype=torch.float32)
    return rows, rows.new_empty(rows.shape[0]), frames.new_empty(pooled, frames.shape[2])


@torch.library.custom_op("rcmstr_fast::project_levels_bwd", mutates_args=())
def _project_bwd(
    grad: Tensor, frames: Tensor, weights: list[Tensor], levels: list[int], num_subwords: int, order: Tensor | None,
    rows: Tensor, inverse: Tensor, pooled: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    from rcmstr_fast.kernels.project_levels import project_levels_bwd

    return project_levels_bwd(grad, frames, weights, levels, num_subwords, order, rows, inverse, pooled)


@_project_bwd.register_fake
def _(grad, frames, weights, levels, num_subwords, order, rows, inverse, pooled):  # type: ignore[no-untyped-def]
    biases = [w.new_empty(w.shape[0], dtype=torch.float32) for w in weights]
    return frames.new_empty(frames.shape), [w.new_empty(w.shape) for w in weights], biases


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    frames, weights, biases, ctx.levels, ctx.num_subwords, order = inputs
    ctx.bias_dtypes = [b.dtype for b in biases]
    ctx.save_for_backward(frames, order, *output, *weights)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    frames, order, rows, inverse, pooled, *weights = ctx.saved_tensors
    grad_frames, grad_weights, grad_biases = _project_bwd(
        grad, frames, weights, ctx.levels, ctx.num_subwords, order, rows, inverse, pooled
    )
    biases = [g.to(dtype) for g, dtype in zip(grad_biases, ctx.bias_dtypes)]
    return grad_frames, grad_weights, biases, None, None, None


_project.register_autograd(_backward, setup_context=_setup)


def _on_triton(
    frames: Tensor, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], num_subwords: int, *,
    order: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    dtype = frames.dtype
    if torch.is_autocast_enabled(frames.device.type):
        dtype = torch.get_autocast_dtype(frames.device.type)
    names = [level for level in LEVELS if level in weights]
    levels = [LEVELS.index(name) for name in names]
    rows, _, _ = _project(
        frames.to(dtype), [weights[n].to(dtype) for n in names], [biases[n] for n in names], levels, num_subwords, order
    )
    return dict(zip(names, rows.split(_counts(frames, num_subwords, levels))))


def _reasons(
    frames: Tensor, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], num_subwords: int, *,
    order: Tensor | None,
) -> list[str]:  # fmt: skip
    found = triton_backend.operand_reasons({"frames": frames, **{f"weights[{n!r}]": w for n, w in weights.items()}})
    width = next(iter(weights.values())).shape[0]
    found += [f"D must be at most 256, got {width}"] if width > 256 else []
    return found + (["frames must have fewer than 2^31 rows"] if frames[..., 0].numel() >= 1 << 31 else [])


register(
    _project_levels,
    "triton",
    _on_triton,
    unsupported_reasons=_reasons,
    available=triton_backend.reasons,
    avoid=triton_backend.avoid_on_cpu,
)


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
