"""Pretraining methods: what a step computes. A method is one module of this package; see docs/new-method.md."""

from rcmstr_fast.methods.base import EncoderMethod
from rcmstr_fast.methods.protocol import MethodSpec, PretrainMethod, ViewSpec, in_passes, to_pixels
from rcmstr_fast.methods.registry import ALL, CNN, VIT, build_method, every_method, find, register, settings
from rcmstr_fast.methods.step import Batch, Collectives, Local, StepOutput

__all__ = [
    "ALL", "CNN", "VIT", "Batch", "Collectives", "EncoderMethod", "Local", "MethodSpec", "PretrainMethod",
    "StepOutput", "ViewSpec", "build_method", "every_method", "find", "in_passes", "register", "settings", "to_pixels",
]  # fmt: skip
