"""Reconstruction loss over hidden pixels."""

from torch import Tensor

from rcmstr_fast.ops import checks
from rcmstr_fast.ops.dispatch import operation, register_triton
from rcmstr_fast.ops.masked_mse import reference, triton

_masked_mse = operation("masked_mse", reference.masked_mse)
register_triton(_masked_mse, triton.masked_mse, triton.reasons)
_NAME = "masked_mse"


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean squared error over the N hidden pixels: sum of squares / (3 N); 0 where nothing is hidden.

    Args:
        prediction: [B, 3, H, W] floating point; visible pixels may hold anything, also NaN. Receives a gradient.
        target: [B, 3, H, W] floating point. No gradient.
        mask: [B, 1, H, W] bool, True: hidden.
        backend: None (automatic), "reference" or "triton".
    Returns:
        0-d float32 (float64 for a float64 prediction).
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices disagree.
    """
    checks.check_tensor(_NAME, "prediction", prediction, ("B", 3, "H", "W"))
    checks.check_tensor(_NAME, "target", target, prediction.shape, like="prediction")
    hidden = (prediction.shape[0], 1, *prediction.shape[2:])
    checks.check_tensor(_NAME, "mask", mask, hidden, "bool", like="prediction")
    checks.check_devices(_NAME, prediction=prediction, target=target, mask=mask)
    return _masked_mse(prediction, target, mask, backend=backend)
