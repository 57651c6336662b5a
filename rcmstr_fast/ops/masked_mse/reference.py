"""Mean squared error over hidden pixels in plain PyTorch."""

import torch
from torch import Tensor

from rcmstr_fast.ops.masked.reference import keep


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.masked_mse`."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    difference = prediction.to(dtype) - target.detach().to(dtype)
    hidden_values = prediction.shape[1] * mask.sum()
    return keep(difference, mask).square().sum() / hidden_values.clamp(min=1)
