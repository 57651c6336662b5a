"""Every kernel configuration that a launcher can choose, with the signature it is compiled for ahead of time.

The queue-loss kernels come in each tile of `tiles` times: InfoNCE + KL at the default temperatures (ratio
7 : 4, one exponential), InfoNCE + KL at any temperatures (two exponentials), and KL alone with index maps; each over a
queue whose length is a multiple of a step ("whole") and over any other.
"""

from rcmstr_fast.kernels.architectures import KNOWN
from rcmstr_fast.kernels.shipped import losses, masked, small
from rcmstr_fast.kernels.shipped.configuration import Configuration

__all__ = ["Configuration", "configurations"]

PARTS = (*losses.PARTS, *small.PARTS, *masked.PARTS)


def configurations() -> list[Configuration]:
    """Every shipped configuration for every architecture, in both specialisations of the sizes."""
    plain = [c for arch in KNOWN for part in PARTS for c in part(arch)]
    return [form for c in plain for form in (c, c.by_sixteen())]
