"""When the Triton kernels can run a list of loss terms; `operator` calls them."""

from collections.abc import Sequence

from rcmstr_fast.kernels.queue_losses import tiles
from rcmstr_fast.ops import triton_backend
from rcmstr_fast.ops.queue_losses.reference import LossTerm


def reasons(terms: Sequence[LossTerm], *, tau_info: float, tau_kl: float, launch: str) -> list[str]:
    """Why the kernels cannot run the terms; each reason once."""
    found: list[str] = []
    for term in terms:
        operands = {"query": term.query, "key": term.key, "queue": term.queue, "query_permuted": term.query_permuted}
        found += triton_backend.operand_reasons(operands)
        if term.query.shape[1] not in tiles.WIDTHS:
            found.append(f"D must be one of {', '.join(map(str, tiles.WIDTHS))}, got {term.query.shape[1]}")
    for name, value in (("tau_info", tau_info), ("tau_kl", tau_kl)):
        if value < tiles.MIN_TAU:
            found.append(f"{name} must be at least {tiles.MIN_TAU}, got {value}")
    return list(dict.fromkeys(found))
