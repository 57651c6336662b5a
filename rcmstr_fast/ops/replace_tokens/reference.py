"""Mask tokens and positions of a ViT in plain PyTorch."""

import torch
from torch import Tensor


def replace_tokens(tokens: Tensor, mask_token: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
    """The public operation in plain PyTorch; see `rcmstr_fast.ops.replace_tokens`."""
    dtype = torch.promote_types(tokens.dtype, position.dtype)
    return torch.where(hidden[:, :, None], mask_token.to(dtype), tokens.to(dtype)) + position.detach()
