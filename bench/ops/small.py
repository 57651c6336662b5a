"""Entries of the small operations: pooling, projection of the levels, masks, reconstruction loss, enqueue, momentum."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.ops.entry import Entry, Provider
from bench.ops.queue_losses import compiled, unit
from rcmstr_fast import ops
from rcmstr_fast.ops import reference


def _differentiable(function: Callable[..., tuple[Tensor, ...]], *leaves: Tensor) -> Provider:
    """Results of `function(*leaves)`, and the gradients of the leaves."""

    def run(gradient: bool) -> list[Tensor]:
        own = [leaf.detach().requires_grad_(gradient) for leaf in leaves]
        results = function(*own)
        if not gradient:
            return [r.detach() for r in results]
        total = torch.stack([(r.float() * (i + 1)).square().mean() for i, r in enumerate(results)]).sum()
        return [*(r.detach() for r in results), *torch.autograd.grad(total, own)]

    return run


def hierarchical_pool(batch: int, device: str) -> Entry:
    """Three levels of the permuted branch: order undone, 26 frames, 256 channels."""
    frames = torch.randn(batch, 26, 256, device=device)
    order = ops.draw_order(torch.arange(batch, device=device), seed=0, epoch=0, num_patches=2, group_size=2)

    def call(function: Callable) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda x: tuple(function(x, 4, order=order))

    providers = {
        "eager": _differentiable(call(reference.hierarchical_pool), frames),
        "compile": _differentiable(compiled(call(reference.hierarchical_pool), device), frames),
        "ours": _differentiable(call(ops.hierarchical_pool), frames),
    }
    exact = _differentiable(call(reference.hierarchical_pool), frames.double())
    return Entry("hierarchical_pool", f"B={batch} T=26 C=256", lambda: exact(True), providers)


def project_levels(batch: int, device: str) -> Entry:
    """Unit rows of three levels of the permuted branch: order undone, pooled, 256 -> 128 channels, normalised."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    frames = torch.randn(batch, 26, 256, device=device).to(dtype)
    names = ("frame", "subword", "word")
    weights = {n: torch.randn(128, 256, device=device).to(dtype) / 16 for n in names}
    biases = {n: torch.randn(128, device=device).to(dtype) for n in names}
    order = ops.draw_order(torch.arange(batch, device=device), seed=0, epoch=0, num_patches=2, group_size=2)

    def call(function: Callable, cast: torch.dtype = dtype) -> Callable[[Tensor], tuple[Tensor, ...]]:
        w, b = ({n: t.to(cast) for n, t in given.items()} for given in (weights, biases))
        # half of the columns: the squares of a whole unit row add up to 1, without a gradient
        return lambda x: tuple(rows[:, :64] for rows in function(x, w, b, 4, order=order).values())

    providers = {
        "eager": _differentiable(call(reference.project_levels), frames),
        "compile": _differentiable(compiled(call(reference.project_levels), device), frames),
        "ours": _differentiable(call(ops.project_levels), frames),
    }
    exact = _differentiable(call(reference.project_levels, torch.float64), frames.double())
    return Entry("project_levels", f"B={batch} T=26 C=256 D=128", lambda: exact(True), providers)


def draw_masks(batch: int, device: str) -> Entry:
    """Masks of a batch for the CNN: 4x25 cells, 70 % hidden, one block."""
    index = torch.arange(batch, device=device)
    how = dict(seed=0, epoch=3, size=(32, 100), unit="stage3", mask_ratio=0.7, num_blocks=1)

    def call(function: Callable) -> Provider:
        return lambda gradient: [m.float() for m in function(index, **how)[:2]]

    exact = reference.draw_masks(index, **how)  # type: ignore[arg-type]
    providers = {"eager": call(reference.draw_masks), "ours": call(ops.draw_masks)}
    return Entry("draw_masks", f"B={batch} 4x25", lambda: [m.double() for m in exact[:2]], providers)


def masked_mse(batch: int, device: str) -> Entry:
    """Reconstruction loss of 32x100 pictures, 70 % hidden."""
    prediction, target = torch.randn(2, batch, 3, 32, 100, device=device)
    mask = torch.rand(batch, 1, 32, 100, device=device) < 0.7

    def call(function: Callable) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda x: (function(x, target, mask),)

    providers = {
        "eager": _differentiable(call(reference.masked_mse), prediction),
        "compile": _differentiable(compiled(call(reference.masked_mse), device), prediction),
        "ours": _differentiable(call(ops.masked_mse), prediction),
    }
    exact = _differentiable(call(reference.masked_mse), prediction.double())
    return Entry("masked_mse", f"B={batch} 32x100", lambda: exact(True), providers)


def replace_tokens(batch: int, device: str) -> Entry:
    """Mask tokens and positions of the small ViT: 256 tokens of 384 channels, 74 % hidden."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokens = torch.randn(batch, 256, 384, device=device).to(dtype)
    mask_token, position = torch.randn(384, device=device), torch.randn(256, 384, device=device)
    hidden = torch.rand(batch, 256, device=device) < 0.74

    def call(function: Callable) -> Callable[..., tuple[Tensor, ...]]:
        return lambda x, learned: (function(x, learned, position, hidden),)

    def plain(x: Tensor, learned: Tensor, position: Tensor, hidden: Tensor) -> Tensor:  # as one writes it: cast late
        return torch.where(hidden[:, :, None], learned.to(x.dtype), x) + position

    providers = {
        "eager": _differentiable(call(plain), tokens, mask_token),
        "compile": _differentiable(compiled(call(plain), device), tokens, mask_token),
        "ours": _differentiable(call(ops.replace_tokens), tokens, mask_token),
    }
    exact = _differentiable(call(reference.replace_tokens), tokens.double(), mask_token.double())
    return Entry("replace_tokens", f"B={batch} N=256 C=384", lambda: exact(True), providers)


def enqueue(batch: int, keys: int, device: str) -> Entry:
    """The frame level's keys of one step into its queue."""
    rows = unit(batch * 26, 128, 0, device)[-keys:]

    def call(function: Callable) -> Provider:
        queue = torch.zeros(keys, 128, device=device)
        pointer = torch.zeros((), dtype=torch.int64, device=device)

        def run(gradient: bool) -> list[Tensor]:
            pointer.zero_().add_(keys - 5)
            function(queue, pointer, rows)
            return [queue]

        return run

    exact = torch.zeros(keys, 128, dtype=torch.float64, device=device)
    exact[(torch.arange(rows.shape[0], device=device) - 5) % keys] = rows.double()
    providers = {"eager": call(reference.enqueue_), "ours": call(ops.enqueue_)}
    return Entry("enqueue_", f"n={rows.shape[0]} K={keys} D=128", lambda: [exact], providers)


def momentum_update(parameters: int, device: str) -> Entry:
    """200 tensors with `parameters` values in all; m = 0.999."""
    sizes = [parameters // 400 if i % 2 else parameters // 133 for i in range(200)]
    source = [torch.randn(n, device=device) for n in sizes]
    start = [torch.randn(n, device=device) for n in sizes]

    def call(function: Callable) -> Provider:
        target = [t.clone() for t in start]

        def run(gradient: bool) -> list[Tensor]:
            function(target, source, 0.999)
            return [] if gradient else [target[0]]

        return run

    def one_by_one(target: list[Tensor], source: list[Tensor], m: float) -> None:
        for old, new in zip(target, source):
            old.mul_(m).add_(new, alpha=1 - m)

    providers = {"eager": call(one_by_one), "ours": call(ops.momentum_update_)}
    return Entry("momentum_update_", f"{sum(sizes)} values, 200 tensors", lambda: [], providers)
