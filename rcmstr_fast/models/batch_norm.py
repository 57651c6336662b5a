"""Batch normalisation over groups of images, which keeps query and key from exchanging statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rcmstr_fast.ops.batch_norm import group_sizes, grouped_batch_norm

#: What a layer saw in one forward: batch mean and unbiased variance `[groups, C]`, and its passes.
Seen = tuple[Tensor, Tensor, int]


class GroupedBatchNorm(_BatchNorm):
    """Batch norm whose training statistics are taken over consecutive groups of `group_size` images.

    Running statistics follow the mean over the groups of the batch mean and of the unbiased batch variance.
    Evaluation uses the running statistics. The state dict has the keys of `nn.BatchNorm2d`.

    Attributes:
        group_size: images a group; 0: the whole batch. Where it does not divide the batch, the rest is a group of
            its own, but a rest of one image joins the group before it.
        passes: equal parts of the batch that are normalised, and move the running statistics, as if each had been
            passed on its own, the first one first.
        tracking: whether training moves the running statistics.
        held: whether each forward notes in `seen` what they are to move by, instead of moving them (`HeldStatistics`).
        seen: these notes.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, dims: int, *, affine: bool = True, group_size: int = 0) -> None:
        """Make a layer with eps 1e-5 and momentum 0.1.

        Args:
            channels: C.
            dims: 2 for maps `[B, C, H, W]`, 1 for rows `[B, .., C]` (channels last).
            affine: with weight and bias.
            group_size: images a group; 0: the whole batch.
        Raises:
            ValueError: dims is neither 1 nor 2.
        """
        if dims not in (1, 2):
            raise ValueError(f"GroupedBatchNorm: dims must be 1 (rows) or 2 (maps), got {dims}")
        super().__init__(channels, affine=affine)
        self.dims = dims
        self.group_size = group_size
        self.passes = 1
        self.tracking, self.held = True, False
        self.seen: list[Seen] = []

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalise, add the residual, apply ReLU.

        Args:
            x: `[B, C, H, W]` (dims=2) or `[B, .., C]` (dims=1), floating point.
            residual: like x.
            relu: apply ReLU.
        Returns:
            Same shape.
        Raises:
            ValueError: another shape, or a group with a single value a channel in training.
        """
        channel = 1 if self.dims == 2 else -1
        if x.dim() < 2 or (self.dims == 2 and x.dim() != 4) or x.shape[channel] != self.num_features:
            shape = f"[B, {self.num_features}, H, W]" if self.dims == 2 else f"[B, .., {self.num_features}]"
            raise ValueError(f"GroupedBatchNorm: input must be {shape}, got {list(x.shape)}")
        if self.training:
            return self._train(x, residual, relu)
        y = F.batch_norm(self._rows(x), self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        y = y.view(x.shape) if self.dims == 1 else y
        y = y if residual is None else y + residual
        return F.relu(y) if relu else y

    def extra_repr(self) -> str:
        """Fields shown by print(model)."""
        return f"{super().extra_repr()}, dims={self.dims}, group_size={self.group_size}"

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.num_features) if self.dims == 1 else x

    def _train(self, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        sizes = group_sizes(x.shape[0] // self.passes, self.group_size)
        if min(sizes) * (x.numel() // max(1, x.shape[0])) == self.num_features:
            raise ValueError(
                "GroupedBatchNorm: training needs more than one value a channel (a batch of two images or more), "
                f"got {list(x.shape)}"
            )
        weight: Tensor = self.weight if self.affine else torch.ones_like(self.running_var)
        bias: Tensor = self.bias if self.affine else torch.zeros_like(self.running_mean)
        rows = x.flatten(1, -2) if self.dims == 1 and x.dim() == 4 else x  # four dimensions are a map to the operation
        made = grouped_batch_norm(
            rows,
            weight,
            bias,
            passes=self.passes,
            group_size=self.group_size,
            eps=self.eps,
            residual=residual,
            relu=relu,
        )
        seen = made.mean, made.var, self.passes
        if self.tracking and self.held:
            self.seen.append(seen)
        elif self.tracking:
            _move([self], [[seen]])
        return made.out.view(x.shape) if rows is not x else made.out


class HeldStatistics:
    """Running statistics that move together when told to, in a handful of operations for all layers.

    Args:
        norms: on one device.
    """

    def __init__(self, norms: list[GroupedBatchNorm]) -> None:
        self._norms = norms
        self._seen: list[list[Seen]] = [[] for _ in norms]

    @contextmanager
    def held(self) -> Iterator[None]:
        """While entered, running statistics stay and layers note what they see; for one pass of each network.

        Each layer begins with no notes. torch.compile makes code for the number of notes that it finds, and would make
        it anew for another number.
        """
        for layer in self._norms:
            layer.held = True
        try:
            yield
        finally:
            for layer, seen in zip(self._norms, self._seen, strict=True):
                layer.held = False
                seen += layer.seen
                layer.seen.clear()

    def move(self, wanted: Tensor) -> None:
        """Move the statistics by all that has been noted, pass by pass, as if they had not waited.

        Args:
            wanted: 0-d bool on the device of the layers; where False they stay as they are.
        """
        seen, self._seen = self._seen, [[] for _ in self._norms]
        _move(self._norms, seen, wanted)


@torch.no_grad()
def _move(norms: list[GroupedBatchNorm], noted: list[list[Seen]], wanted: Tensor | None = None) -> None:
    """Move each layer's running statistics by its notes; layers with notes of the same shapes at once."""
    alike: dict[tuple, list[int]] = {}
    for i, (layer, notes) in enumerate(zip(norms, noted, strict=True)):
        if notes:
            calls = tuple((passes, len(mean)) for mean, _, passes in notes)
            alike.setdefault((layer.momentum, calls), []).append(i)
    for (momentum, calls), members in alike.items():
        running = [x for i in members for x in (norms[i].running_mean, norms[i].running_var)]
        moved = before = torch.cat(running)
        for call, (passes, _) in enumerate(calls):
            seen = torch.cat([x for i in members for x in noted[i][call][:2]], dim=1).to(before.dtype)
            for of_pass in seen.unflatten(0, (passes, -1)).mean(1):
                moved = moved.lerp(of_pass, momentum)
        if wanted is not None:
            moved = torch.where(wanted, moved, before)
        torch._foreach_copy_(running, moved.split([len(x) for x in running]))
        torch._foreach_add_([norms[i].num_batches_tracked for i in members], sum(passes for passes, _ in calls))


def norms_of(module: nn.Module) -> list[GroupedBatchNorm]:
    """Every GroupedBatchNorm inside `module`."""
    return [layer for layer in module.modules() if isinstance(layer, GroupedBatchNorm)]


@contextmanager
def batch_norm_state(norms: list[GroupedBatchNorm], *, passes: int, tracking: bool = True) -> Iterator[None]:
    """Set `passes` and `tracking` of the layers while entered."""
    before = [(layer.passes, layer.tracking) for layer in norms]
    for layer in norms:
        layer.passes, layer.tracking = passes, tracking
    try:
        yield
    finally:
        for layer, (held_passes, held_tracking) in zip(norms, before, strict=True):
            layer.passes, layer.tracking = held_passes, held_tracking


def set_bn_groups(module: nn.Module, size: int) -> None:
    """Set `group_size` of every GroupedBatchNorm inside `module`; 0: the whole batch."""
    if size < 0:
        raise ValueError(f"set_bn_groups: size must be 0 (whole batch) or more, got {size}")
    for layer in norms_of(module):
        layer.group_size = size
