"""Batch normalisation over groups of images, which keeps query and key from exchanging statistics."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rcmstr_fast.ops.masked_norm import group_sizes


class GroupedBatchNorm(_BatchNorm):
    """Batch norm whose training statistics are taken over consecutive groups of `group_size` images.

    Running statistics follow the mean over the groups of the batch mean and of the unbiased batch variance.
    Evaluation uses the running statistics. The state dict has the keys of `nn.BatchNorm2d`.

    Attributes:
        group_size: images a group; 0: the whole batch. Where it does not divide the batch, the rest is a group of
            its own, but a rest of one image joins the group before it.
    """

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

    def forward(self, x: Tensor) -> Tensor:
        """Normalise.

        Args:
            x: `[B, C, H, W]` (dims=2) or `[B, .., C]` (dims=1), floating point.
        Returns:
            Same shape.
        Raises:
            ValueError: another shape, or a group with a single value a channel in training.
        """
        channel = 1 if self.dims == 2 else -1
        if x.dim() < 2 or (self.dims == 2 and x.dim() != 4) or x.shape[channel] != self.num_features:
            shape = f"[B, {self.num_features}, H, W]" if self.dims == 2 else f"[B, .., {self.num_features}]"
            raise ValueError(f"GroupedBatchNorm: input must be {shape}, got {list(x.shape)}")
        if not self.training:
            y = F.batch_norm(self._rows(x), self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
            return y.view(x.shape) if self.dims == 1 else y
        return self._train(x)

    def extra_repr(self) -> str:
        """Fields shown by print(model)."""
        return f"{super().extra_repr()}, dims={self.dims}, group_size={self.group_size}"

    def _rows(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.num_features) if self.dims == 1 else x

    def _train(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        parts = x.split(group_sizes(x.shape[0], self.group_size))
        if len(parts) == 1:
            return self._normalise(x, self.running_mean, self.running_var, self.momentum)
        # With momentum 1 each group leaves exactly its own mean and unbiased variance in a fresh buffer.
        stats = self.running_mean.new_zeros(len(parts), 2, self.num_features)
        y = torch.cat([self._normalise(part, *stats[i], 1.0) for i, part in enumerate(parts)])
        mean, var = stats.mean(0)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        return y

    def _normalise(self, x: Tensor, mean: Tensor, var: Tensor, momentum: float) -> Tensor:
        if x.numel() == self.num_features:
            raise ValueError(
                "GroupedBatchNorm: training needs more than one value a channel (a batch of two images or more), "
                f"got {list(x.shape)}"
            )
        y = F.batch_norm(self._rows(x), mean, var, self.weight, self.bias, True, momentum, self.eps)
        return y.view(x.shape) if self.dims == 1 else y


def set_bn_groups(module: nn.Module, size: int) -> None:
    """Set `group_size` of every GroupedBatchNorm inside `module`; 0: the whole batch."""
    if size < 0:
        raise ValueError(f"set_bn_groups: size must be 0 (whole batch) or more, got {size}")
    for layer in module.modules():
        if isinstance(layer, GroupedBatchNorm):
            layer.group_size = size
