"""Hidden tokens replaced by one learned vector, positions added: the first layer of a masked ViT, forward and backward.

out = where(hidden, mask_token, tokens) + position. A program holds BLOCK_R tokens of the flat [B N] for BLOCK_C
channels. Hidden tokens are never loaded, so NaN there cannot leak. Backward splits the gradient: visible rows go to the
tokens (hidden ones get 0), hidden rows add up in the program, and the sums of the programs add up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rcmstr_fast.kernels import runtime

BLOCK_R, BLOCK_C = 64, 64


@triton.jit
def _place(hidden_ptr, count, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and channels of this program, which rows are hidden, what lies inside."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    hidden = tl.load(hidden_ptr + rows, mask=rows < count, other=0) != 0
    return rows[:, None], c[None, :], hidden[:, None], (rows < count)[:, None] & (c < C)[None, :]


@triton.jit
def _replace_tokens_fwd_kernel(
    tokens_ptr,
    mask_token_ptr,
    position_ptr,
    hidden_ptr,
    out_ptr,
    count,
    N,
    C,
    x_b,
    x_n,
    x_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid: blocks of tokens, of channels. Reads each visible token and writes each token once; arithmetic in fp32."""
    rows, c, hidden, inside = _place(hidden_ptr, count, C, BLOCK_R, BLOCK_C)
    offsets = (rows // N) * x_b + (rows % N) * x_n + c * x_c
    tokens = tl.load(tokens_ptr + offsets, mask=inside & ~hidden, other=0.0).to(tl.float32)
    learned = tl.load(mask_token_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    position = tl.load(position_ptr + (rows % N) * C + c, mask=inside, other=0.0).to(tl.float32)
    out = tl.where(hidden, learned, tokens) + position
    tl.store(out_ptr + rows * C + c, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _replace_tokens_bwd_kernel(
    grad_ptr, hidden_ptr, grad_tokens_ptr, partials_ptr, count, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Gradient in the tokens, and the sum of this block's hidden rows in partials [blocks, C] (grid as forward).

    Note: reads and writes each row once, and 4 C bytes a block; sums in fp32, bitwise repeatable.
    """
    rows, c, hidden, inside = _place(hidden_ptr, count, C, BLOCK_R, BLOCK_C)
    grad = tl.load(grad_ptr + rows * C + c, mask=inside, other=0.0).to(tl.float32)
    visible = tl.where(hidden, 0.0, grad)
    tl.store(grad_tokens_ptr + rows * C + c, visible.to(grad_tokens_ptr.dtype.element_ty), mask=inside)
    total = tl.sum(tl.where(hidden, grad, 0.0), axis=0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(partials_ptr + tl.program_id(0).to(tl.int64) * C + columns, total, mask=columns < C)


def _grid(count: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(count, BLOCK_R), triton.cdiv(channels, BLOCK_C)


def replace_tokens_fwd(tokens: Tensor, mask_token: Tensor, position: Tensor, hidden: Tensor) -> Tensor:
    """Tokens with the hidden ones replaced, plus positions.

    Args:
        tokens: [B, N, C] float16, bfloat16 or float32, any layout.
        mask_token: [C] of these dtypes.
        position: [N, C] of these dtypes.
        hidden: [B, N] bool.
    Returns:
        [B, N, C] contiguous, in the wider dtype of tokens and position.
    """
    _, number, channels = tokens.shape
    dtype = torch.promote_types(tokens.dtype, position.dtype)
    out = torch.empty(tokens.shape, dtype=dtype, device=tokens.device)
    if out.numel():
        with runtime.on_device(tokens.device):
            _replace_tokens_fwd_kernel[_grid(hidden.numel(), channels)](
                tokens,
                mask_token.contiguous(),
                position.contiguous(),
                hidden.contiguous(),
                out,
                hidden.numel(),
                number,
                channels,
                *tokens.stride(),
                BLOCK_R=BLOCK_R,
                BLOCK_C=BLOCK_C,
            )
    return out


def replace_tokens_bwd(grad_out: Tensor, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients in the tokens and in the mask token.

    Args:
        grad_out: [B, N, C] float16, bfloat16 or float32.
        hidden: [B, N] bool.
        dtype: of the tokens.
    Returns:
        [B, N, C] contiguous in `dtype`, and [C] float32.
    """
    channels = grad_out.shape[2]
    grid = _grid(hidden.numel(), channels)
    grad_tokens = torch.empty(grad_out.shape, dtype=dtype, device=grad_out.device)
    partials = torch.empty((grid[0], channels), dtype=torch.float32, device=grad_out.device)
    if grad_out.numel():
        with runtime.on_device(grad_out.device):
            _replace_tokens_bwd_kernel[grid](
                grad_out.contiguous(),
                hidden.contiguous(),
                grad_tokens,
                partials,
                hidden.numel(),
                channels,
                BLOCK_R=BLOCK_R,
                BLOCK_C=BLOCK_C,
            )
    return grad_tokens, partials.sum(dim=0)
