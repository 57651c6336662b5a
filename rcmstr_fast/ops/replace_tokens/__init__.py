"""Mask tokens in place of hidden tokens, and positions."""

from torch import Tensor

from rcmstr_fast.ops import checks
from rcmstr_fast.ops.dispatch import operation, register_triton
from rcmstr_fast.ops.replace_tokens import reference, triton

_replace_tokens = operation("replace_tokens", reference.replace_tokens)
register_triton(_replace_tokens, triton.replace_tokens, triton.reasons)
_NAME = "replace_tokens"


def replace_tokens(
    tokens: Tensor, mask_token: Tensor, position: Tensor, hidden: Tensor, *, backend: str | None = None
) -> Tensor:
    """Replace hidden tokens by one learned vector and add positions: where(hidden, mask_token, tokens) + position.

    Args:
        tokens: [B, N, C] floating point; hidden ones may hold anything, also NaN. Receives a gradient (0 if hidden).
        mask_token: [C] floating point; the learned vector. Receives a gradient.
        position: [N, C] floating point. No gradient.
        hidden: [B, N] bool.
        backend: None (automatic), "reference" or "triton".
    Returns:
        [B, N, C] in the wider dtype of tokens and position, whatever the autocast state.
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree.
    """
    checks.check_tensor(_NAME, "tokens", tokens, ("B", "N", "C"))
    batch, number, channels = tokens.shape
    checks.check_tensor(_NAME, "mask_token", mask_token, (channels,), like="tokens")
    checks.check_tensor(_NAME, "position", position, (number, channels), like="tokens")
    checks.check_tensor(_NAME, "hidden", hidden, (batch, number), "bool", like="tokens")
    checks.check_devices(_NAME, tokens=tokens, mask_token=mask_token, position=position, hidden=hidden)
    return _replace_tokens(tokens, mask_token, position, hidden, backend=backend)
