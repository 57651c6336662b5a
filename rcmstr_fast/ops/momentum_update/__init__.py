"""Momentum update of the key encoder."""

from collections.abc import Sequence

from torch import Tensor

from rcmstr_fast.ops import checks
from rcmstr_fast.ops.dispatch import only_reference
from rcmstr_fast.ops.momentum_update import reference

_NAME = "momentum_update_"


def momentum_update_(
    target: Sequence[Tensor], source: Sequence[Tensor], m: float, *, backend: str | None = None
) -> None:
    """Exponential moving average in place: target = m target + (1 - m) source.

    Args:
        target: floating-point tensors; updated without recording gradients.
        source: tensors of the same shapes, dtypes and devices.
        m: 0 to 1.
        backend: None or "reference": torch's own multi-tensor kernel already moves the least possible memory.
    Raises:
        TypeError: a tensor of another dtype.
        ValueError: the lists' lengths or a pair's shapes or devices differ, m outside 0..1.
    """
    only_reference(_NAME, backend)
    if len(target) != len(source):
        raise ValueError(f"{_NAME}: source must have {len(target)} tensors like target, got {len(source)}")
    if not 0 <= m <= 1:
        raise ValueError(f"{_NAME}: m must be in 0..1, got {m}")
    for i, (old, new) in enumerate(zip(target, source)):
        checks.check_tensor(_NAME, f"target[{i}]", old, old.shape)
        checks.check_tensor(_NAME, f"source[{i}]", new, old.shape, like=f"target[{i}]")
        if new.dtype != old.dtype:
            raise TypeError(f"{_NAME}: source[{i}] must be {old.dtype} like target[{i}], got {new.dtype}")
        checks.check_devices(_NAME, **{f"target[{i}]": old, f"source[{i}]": new})
    reference.momentum_update_(target, source, m)
