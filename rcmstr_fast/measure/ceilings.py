"""How fast a device can be at all: rates measured on it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from rcmstr_fast import timer
from rcmstr_fast.methods.costs import Work


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at its best.

    Attributes:
        flop_per_s: of a large matrix product in the training precision.
        bytes_per_s: of a large copy, bytes read and written.
        source: how they were obtained.
    """

    flop_per_s: float
    bytes_per_s: float
    source: str

    def ms(self, works: Iterable[Work]) -> float:
        """Shortest time of works one after the other: each takes as long as its slower side."""
        return 1e3 * sum(max(w.flop / self.flop_per_s, w.bytes / self.bytes_per_s) for w in works)


def measure_ceilings(device: torch.device, precision: str) -> Ceilings:
    """Best rates of a matrix product and of a copy on this device, measured now (a second or less).

    Args:
        device: of the training.
        precision: bf16 or fp32 of the product.
    """
    cuda = device.type == "cuda"
    side, numbers = (8192, 1 << 30) if cuda else (512, 1 << 22)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(numbers, device=device, dtype=torch.float32).fill_(1.0)
    target = torch.empty_like(source)
    runs = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    times = timer.alternate(runs, device, rounds=5, warm_up=2)
    flop, copied = 2e3 * side**3 / times["product"].best, 8e3 * numbers / times["copy"].best
    name = torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads"
    return Ceilings(flop, copied, f"{name}: {side}^3 {precision} product and {4 * numbers >> 20} MiB copy in this run")
