"""How each stage of a masked pass is stored and computed: dense, or as packed rows; decided by a measured table."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.ops import checks, listed, packed, site_lists, site_rows, triton_backend
from rcmstr_fast.ops.dispatch import BackendError
from rcmstr_fast.ops.reference import Sites
from rcmstr_fast.ops.reference.sites import keep

_NAME = "masked_storage"

#: Device -> sites of a stage's map -> largest share of active sites at which skipping the hidden ones was measured faster
#: than dense x mask, forward + backward with batch norm, at every width (bench.ops, masked_pass); the largest entry
#: that is not above the stage's sites decides. A device without entries has not been measured and stays dense;
#: RCMSTR_FAST_MASKED_STAGES replaces the table. On CUDA the share is what the host expects (`Masks.visible`), never counted.
LARGEST_PACKED_SHARE: dict[str, dict[int, float]] = {"cpu": {1: 0.8, 150: 0.7, 400: 0.55, 1600: 0.4}, "cuda": {}}


def largest_packed_share(device: str, sites: int) -> float:
    """The break-even share of active sites for a map of so many sites; 0 where dense always wins."""
    ordered = env.masked_stages()
    table = LARGEST_PACKED_SHARE.get(device, {}) if ordered is None else ordered
    return max(((entry, share) for entry, share in table.items() if entry <= sites), default=(0, 0.0))[1]


def refusals(sites: Sequence[Sites]) -> list[str]:
    """Why this masked pass cannot be stored as packed rows."""
    found = site_rows.reasons()
    if any(s.active.device.type != "cpu" for s in sites):
        found.append(f"packed rows are for the CPU, got {sites[0].active.device}")
    if any(s.active.numel() >= 1 << 31 for s in sites):
        found.append("a stage has 2^31 sites or more")
    if torch.compiler.is_compiling():
        found.append("the number of rows is unknown inside torch.compile")
    return found


#: Kernel, stride and padding of a convolution.
WindowShape = tuple[site_rows.Pair, site_rows.Pair, site_rows.Pair]


def _listed(sites: Sequence[Sites], visible: float | None) -> list[Sites]:
    """Stages on CUDA: listed where the expected share of active sites is below the break-even, else as they are."""
    if visible is None or triton_backend.reasons() or torch.compiler.is_compiling():
        return list(sites)
    return [
        site_lists.ListedSites.make(stage)
        if visible <= largest_packed_share("cuda", stage.active.shape[2] * stage.active.shape[3])
        else stage
        for stage in sites
    ]


def masked_storage(
    sites: Sequence[Sites],
    *,
    visible: float | None = None,
    windows: Sequence[Sequence[WindowShape]] | None = None,
    backend: str | None = None,
) -> list[Sites]:
    """Choose how each stage of a masked pass keeps its maps.

    With the sites returned here the masked layers accept and return either [B, C, h, w] maps or, at stages where
    few sites are active, rows [N, C] of the active sites only (CPU) or maps that hold anything at inactive sites, as
    do their gradients (lists); each layer converts what it gets. `unpack_sites` turns the last result into a map that
    is zero there. With plain `Sites` every layer takes and gives dense maps.

    Args:
        sites: of each stage, fine to coarse (`active_sites`).
        visible: share of active sites as the host expects it (`Masks.visible`); decides on CUDA, where None means dense.
        windows: kernel, stride and padding of the convolutions of each stage, so that a GPU makes their lists in a few
            launches; None: a window's lists are made when its first convolution runs.
        backend: "cpp": every stage packed; "triton": dense maps whose site lists are made once a stage; another: none;
            None: RCMSTR_FAST_BACKEND, else as the table `LARGEST_PACKED_SHARE` says.
    Returns:
        Sites of each stage, to be passed to the masked layers.
    Raises:
        BackendError: backend="cpp" cannot run here.
    """
    order = backend or env.backend()
    on_gpu = order is None and bool(sites) and sites[0].active.device.type == "cuda"
    if on_gpu or order == "triton":
        made: list[Sites] = _listed(sites, visible) if on_gpu else [*map(site_lists.ListedSites.make, sites)]
        if windows is not None:
            site_lists.prepare(made, [[site_rows.Window(*shape) for shape in of_stage] for of_stage in windows])
        return made
    reasons = refusals(sites)
    if order == "cpp" and reasons:
        raise BackendError(f"{_NAME}: backend cpp cannot: {', '.join(reasons)}")
    if reasons or order not in (None, "cpp"):
        return list(sites)
    stored: list[Sites] = []
    before: site_rows.RowList | None = None
    for stage in sites:
        rows = site_rows.RowList(stage.active)
        share = rows.count / max(1, stage.active.numel())
        pack = order == "cpp" or share <= largest_packed_share("cpu", stage.active[0].numel())
        if before is None and stage.source is not None:
            before = site_rows.RowList(stage.source)
        stored.append(packed.StoredSites.make(stage, pack, rows, before))
        before = rows
    return stored


def unpack_sites(x: Tensor, sites: Sites) -> Tensor:
    """The dense map of a stage's result, zero at inactive sites.

    Args:
        x: rows [N, C] of the active sites, or [B, C, h, w], with anything at inactive sites where these are listed.
        sites: those that made it.
    Returns:
        [B, C, h, w]; x itself where it is such a map.
    Raises:
        ValueError: x fits neither.
    """
    if not isinstance(sites, packed.StoredSites) or x.dim() == 4:
        batch, _, height, width = sites.active.shape
        checks.check_tensor("unpack_sites", "x", x, (batch, "C", height, width), like="sites")
        return x if listed.fills(sites) else keep(x, sites.active)
    checks.check_tensor("unpack_sites", "x", x, (sites.rows.count, "C"), like="the active sites")
    return sites.rows.unpack(x)


def describe() -> list[str]:
    """The table in words, for `rcmstr doctor`."""
    lines = []
    ordered = env.masked_stages()
    for device, measured in LARGEST_PACKED_SHARE.items():
        table = measured if ordered is None else ordered
        steps = ", ".join(f"{share:.0%} from {sites} sites" for sites, share in table.items())
        sparse = "lists of active sites" if device == "cuda" else "packed rows"
        why = " (ordered by RCMSTR_FAST_MASKED_STAGES)" if ordered is not None else "" if table else " (unmeasured)"
        chosen = f"{sparse} up to an active share of {steps}; dense x mask above" if table else "dense x mask"
        lines.append(f"masked pass on {device}: {chosen}{why}")
    return lines
