"""Active sites of every stage of a CNN under a mask."""

from collections.abc import Sequence

from torch import Tensor

from rcmstr_fast.ops import checks
from rcmstr_fast.ops.dispatch import only_reference
from rcmstr_fast.ops.masked import reference
from rcmstr_fast.ops.masked.layers import Sites

_NAME = "active_sites"


def active_sites(
    mask: Tensor, stages: Sequence[tuple[int, int]], rule: str = "anchored", *, backend: str | None = None
) -> list[Sites]:
    """Carry a mask to every stage of a CNN.

    A stage whose size is a multiple of the mask's grid repeats the grid. Any other stage follows from the stage
    before it (the first one: from the grid), axis by axis, h0 -> h rows and w0 -> w columns:

    | change | layer | active where |
    |---|---|---|
    | rows or columns / integer | windows side by side | any site of the window is |
    | rows + 1, columns + 1 with rule "any" | k2 s1 p1 | site j - 1 or j is |
    | rows - 1, columns - 1 with rule "any" | k2 s1 p0 | site j or j + 1 is |
    | columns + 1 with rule "anchored" | k2 s1 p1 | site min(j, w0 - 1) is |
    | columns - 1 with rule "anchored" | k2 s1 p0 | site j is |

    Args:
        mask: [B, gh, gw] bool, True: hidden (`Masks.grid`).
        stages: (h, w) of each stage, fine to coarse.
        rule: "anchored" (the active share stays as it is) or "any" (it grows at each odd pooling).
        backend: None or "reference", the only one.
    Returns:
        A stage: `Sites(active [B, 1, h, w] bool, source)`, source being the map of the stage before it or None.
    Raises:
        TypeError: mask is not bool.
        ValueError: unknown rule, or a stage that follows from neither the grid nor the stage before it.
    """
    only_reference(_NAME, backend)
    checks.check_tensor(_NAME, "mask", mask, ("B", "gh", "gw"), "bool")
    checks.check_choice(_NAME, "rule", rule, ("anchored", "any"))
    rows, columns = mask.shape[1:]
    before = (rows, columns)
    for stage in stages:
        from_grid = stage[0] % rows == 0 and stage[1] % columns == 0
        if min(stage) < 1 or not (from_grid or all(_carries(a, b) for a, b in zip(before, stage))):
            raise ValueError(
                f"{_NAME}: stages must each be a multiple of the mask's {rows}x{columns} or follow from the stage "
                f"before it by / n, + 1 or - 1 an axis, got {stage[0]}x{stage[1]} after {before[0]}x{before[1]}"
            )
        before = stage
    return reference.active_sites(mask, stages, rule)


def _carries(before: int, size: int) -> bool:
    """Whether an axis of `before` sites can become `size` sites."""
    return abs(size - before) <= 1 or before % size == 0
