"""Triton backend of `project_levels` as a custom operator."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rcmstr_fast.ops import triton_backend

LEVELS = ("frame", "subword", "word")


def _counts(frames: Tensor, num_subwords: int, levels: list[int]) -> list[int]:
    """Rows of each of `levels`."""
    batch, length, _ = frames.shape
    return [(batch * length, batch * num_subwords, batch)[level] for level in levels]


@torch.library.custom_op("rcmstr_fast::project_levels", mutates_args=())
def _project(
    frames: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    levels: list[int],
    num_subwords: int,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of all levels [R, D] float32, 1 / norm [R], averages of subwords and words."""
    from rcmstr_fast.kernels.project_levels import project_levels_fwd

    return project_levels_fwd(frames, weights, biases, levels, num_subwords, order)


@_project.register_fake
def _(frames, weights, biases, levels, num_subwords, order):
    counts = _counts(frames, num_subwords, levels)
    pooled = sum(count for count, level in zip(counts, levels) if level)
    rows = frames.new_empty(sum(counts), weights[0].shape[0], dtype=torch.float32)
    return rows, rows.new_empty(rows.shape[0]), frames.new_empty(pooled, frames.shape[2])


@torch.library.custom_op("rcmstr_fast::project_levels_bwd", mutates_args=())
def _project_bwd(
    grad: Tensor,
    frames: Tensor,
    weights: list[Tensor],
    levels: list[int],
    num_subwords: int,
    order: Tensor | None,
    rows: Tensor,
    inverse: Tensor,
    pooled: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    from rcmstr_fast.kernels.project_levels import project_levels_bwd

    return project_levels_bwd(grad, frames, weights, levels, num_subwords, order, rows, inverse, pooled)


@_project_bwd.register_fake
def _(grad, frames, weights, levels, num_subwords, order, rows, inverse, pooled):
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


def project_levels(
    frames: Tensor,
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    num_subwords: int,
    *,
    order: Tensor | None,
) -> dict[str, Tensor]:
    """The public operation on the kernels."""
    dtype = frames.dtype
    if torch.is_autocast_enabled(frames.device.type):
        dtype = torch.get_autocast_dtype(frames.device.type)
    names = [level for level in LEVELS if level in weights]
    levels = [LEVELS.index(name) for name in names]
    rows, _, _ = _project(
        frames.to(dtype), [weights[n].to(dtype) for n in names], [biases[n] for n in names], levels, num_subwords, order
    )
    return dict(zip(names, rows.split(_counts(frames, num_subwords, levels))))


def reasons(
    frames: Tensor,
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    num_subwords: int,
    *,
    order: Tensor | None,
) -> list[str]:
    """Why the kernels cannot run the call."""
    found = triton_backend.operand_reasons({"frames": frames, **{f"weights[{n!r}]": w for n, w in weights.items()}})
    width = next(iter(weights.values())).shape[0]
    found += [f"D must be at most 256, got {width}"] if width > 256 else []
    return found + (["frames must have fewer than 2^31 rows"] if frames[..., 0].numel() >= 1 << 31 else [])
