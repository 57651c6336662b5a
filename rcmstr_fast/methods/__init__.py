"""Pretraining methods: what a step computes. A method is one module of this package; see docs/new-method.md."""

from rcmstr_fast.methods.base import EncoderMethod
from rcmstr_fast.methods.protocol import (
    Batch,
    Collectives,
    Local,
    MethodSpec,
    PretrainMethod,
    StepOutput,
    ViewSpec,
    in_passes,
    to_pixels,
)
from rcmstr_fast.methods.registry import ALL, CNN, VIT, build_method, every_method, find, register, settings

__all__ = [
    "ALL", "CNN", "VIT", "Batch", "Collectives", "EncoderMethod", "Local", "MethodSpec", "PretrainMethod",
    "StepOutput", "ViewSpec", "build_method", "every_method", "find", "in_passes", "register", "settings", "to_pixels",
]  # fmt: skip
