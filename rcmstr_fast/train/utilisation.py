"""Model FLOP utilisation of a run: the operations its mathematics needs, over those that its GPUs could do."""

from dataclasses import dataclass

import torch

from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.methods.costs import step_works


@dataclass(frozen=True)
class Peak:
    """Known rates of a GPU.

    Attributes:
        sheet: dense bf16 operations a second of its data sheet, the usual denominator of MFU.
        reached: what a large half-precision product reaches, the floor of single operations.
    """

    sheet: float
    reached: float


#: part of a GPU's name -> its rates
PEAKS = {"H200": Peak(989e12, 790e12), "H100": Peak(989e12, 790e12), "A100": Peak(312e12, 312e12)}


def peak(name: str) -> Peak | None:
    """The known rates of a GPU of this name; None for other devices."""
    return next((found for part, found in PEAKS.items() if part in name), None)


def images_per_s_at_peak(config: PretrainConfig, device: torch.device, bf16: bool) -> float | None:
    """Images a second at which one device would do nothing but the operations that the mathematics needs.

    Args:
        config: resolved.
        device: of training.
        bf16: products are computed in bfloat16, the precision of the data sheets.
    Returns:
        None on a CPU, on a GPU that `PEAKS` does not know, and in another precision: there is nothing to divide by.
    """
    known = peak(torch.cuda.get_device_name(device)) if device.type == "cuda" and bf16 else None
    return None if known is None else known.sheet / sum(work.flop for work in step_works(config, 1, "bf16"))
