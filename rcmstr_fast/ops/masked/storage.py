"""Which storage each stage of a masked pass gets: rows (CPU), lists (GPU) or dense maps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.ops import checks, dispatch, native, triton_backend
from rcmstr_fast.ops.dispatch import BackendError
from rcmstr_fast.ops.masked.cpu import RowList, RowSites
from rcmstr_fast.ops.masked.layers import Pair, Sites, StoredSites, Window
from rcmstr_fast.ops.masked.lists import ListSites, prepare
from rcmstr_fast.tuning import choices
from rcmstr_fast.tuning.choices import Choice, Setting, Value

_NAME = "masked_storage"
#: The operations that work on what is stored here.
LAYERS = ("masked_conv_norm", "masked_conv2d", "masked_batch_norm", "masked_max_pool2d")

#: The prior: device -> sites of a stage's map -> largest share of active sites at which hidden ones are skipped. Of the
#: entries that are not above the stage's sites the largest decides. On a CPU these are break-evens of forward and backward
#: with batch norm at every width (python -m bench.ops --only masked_pass). On CUDA they are the static model's: at 4x26
#: and 8x25 sites with 30 % of them active it predicts 3 to 5 times the speed of dense layers, in proportion to the share,
#: and no gain on the finer maps, whose dense layers are bound by memory. A run measures its own stages (`STAGES`);
#: RCMSTR_FAST_MASKED_STAGES orders. On CUDA the share is what the host expects (`Masks.visible`): counting would wait.
LARGEST_PACKED_SHARE: dict[str, dict[int, float]] = {
    "cpu": {1: 0.8, 150: 0.7, 400: 0.55, 1600: 0.4},
    "cuda": {1: 0.7, 400: 0.0},
}
#: The value of `STAGES` that leaves every stage to the table.
_BY_TABLE = -1


def largest_packed_share(device: str, sites: int) -> float:
    """The largest share of active sites at which a map of so many sites is packed without a measurement."""
    ordered = env.masked_stages()
    table = LARGEST_PACKED_SHARE.get(device, {}) if ordered is None else ordered
    return max(((entry, share) for entry, share in table.items() if entry <= sites), default=(0, 0.0))[1]


def _skips(device: str, sites: int, share: float) -> bool:
    """Whether a stage skips its hidden sites: as ordered, as measured in this run, or by the table."""
    measured = choices.value(STAGES.name)
    if env.masked_stages() is not None or measured in (None, _BY_TABLE):
        return share <= largest_packed_share(device, sites)
    return sites <= measured


def _sizes(setting: Setting) -> list[int]:
    """Sites of the stages, each size once, coarse to fine; empty where they cannot be skipped."""
    missing = native.reasons() if setting.device == "cpu" else triton_backend.reasons()
    known = setting.visible is not None and not missing
    return sorted({height * width for height, width in setting.stages}) if known else []


def _prior(setting: Setting) -> Value:
    share = 1.0 if setting.visible is None else setting.visible
    skipping = {n for n in _sizes(setting) if share <= largest_packed_share(setting.device, n)}
    largest = max(skipping, default=0)
    return largest if skipping == {n for n in _sizes(setting) if n <= largest} else _BY_TABLE


def _candidates(setting: Setting) -> list[Value]:
    sizes = _sizes(setting)
    return list(dict.fromkeys([_prior(setting), 0, *sizes])) if sizes else []


def _shown(value: Value) -> str:
    by_name = {0: "dense x mask", _BY_TABLE: "by the table"}
    return by_name.get(int(value), f"sparse up to {value} sites")


#: The largest map, in sites, whose stage skips hidden sites in this run.
STAGES = choices.declare(
    Choice(
        "masked.stages",
        "stages of the masked pass that skip hidden sites",
        "masked_pass",
        2.0,
        _candidates,
        _prior,
        lambda setting: "RCMSTR_FAST_MASKED_STAGES" if env.masked_stages() is not None else "",
        _shown,
    )
)


def _refused(backend: str) -> list[str]:
    """What the self-check has against a backend of the masked layers; asked where a pass is stored, not by layers."""
    known = dispatch.operations()
    return [reason for name in LAYERS for reason in known[name].refusal(backend)]


def refusals(sites: Sequence[Sites]) -> list[str]:
    """Why this masked pass cannot be stored as packed rows."""
    found = native.reasons()
    if any(s.active.device.type != "cpu" for s in sites):
        found.append(f"packed rows are for the CPU, got {sites[0].active.device}")
    if any(s.active.numel() >= 1 << 31 for s in sites):
        found.append("a stage has 2^31 sites or more")
    if torch.compiler.is_compiling():
        found.append("the number of rows is unknown inside torch.compile")
    return found


#: Kernel, stride and padding of a convolution.
WindowShape = tuple[Pair, Pair, Pair]


def _listed(sites: Sequence[Sites], visible: float | None) -> list[Sites]:
    """Stages on CUDA: listed where hidden sites are skipped, else as they are."""
    if visible is None or triton_backend.reasons() or torch.compiler.is_compiling() or _refused("triton"):
        return list(sites)
    return [
        ListSites.make(stage) if _skips("cuda", stage.active.shape[2] * stage.active.shape[3], visible) else stage
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
        visible: share of active sites as the host expects it (`Masks.visible`); decides on CUDA, where None means
            dense.
        windows: kernel, stride and padding of the convolutions of each stage, so that a GPU makes their lists in a few
            launches; None: a window's lists are made when its first convolution runs.
        backend: "cpp": every stage packed; "triton": dense maps whose site lists are made once a stage; another: none;
            None: RCMSTR_FAST_BACKEND, else as ordered, measured, or by the table `LARGEST_PACKED_SHARE`.
    Returns:
        Sites of each stage, to be passed to the masked layers.
    Raises:
        BackendError: backend="cpp" cannot run here.
    """
    order = backend or env.backend()
    on_gpu = order is None and bool(sites) and sites[0].active.device.type == "cuda"
    if on_gpu or order == "triton":
        made: list[Sites] = _listed(sites, visible) if on_gpu else [*map(ListSites.make, sites)]
        if windows is not None:
            prepare(made, [[Window(*shape) for shape in of_stage] for of_stage in windows])
        return made
    reasons = refusals(sites)
    if order == "cpp" and reasons:
        raise BackendError(f"{_NAME}: backend cpp cannot: {', '.join(reasons)}")
    if reasons or order not in (None, "cpp") or (order is None and _refused("cpp")):
        return list(sites)
    stored: list[Sites] = []
    before: RowList | None = None
    for stage in sites:
        rows = RowList(stage.active)
        share = rows.count / max(1, stage.active.numel())
        pack = order == "cpp" or _skips("cpu", stage.active[0].numel(), share)
        stored.append(RowSites.make(stage, pack, rows, before))
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
    if isinstance(sites, RowSites) and x.dim() == 2:
        checks.check_tensor("unpack_sites", "x", x, (sites.rows.count, "C"), like="the active sites")
    else:
        batch, _, height, width = sites.active.shape
        checks.check_tensor("unpack_sites", "x", x, (batch, "C", height, width), like="sites")
    return sites.give_out(x) if isinstance(sites, StoredSites) else x


def describe() -> list[str]:
    """What decides in words, for `rcmstr doctor`."""
    lines = []
    ordered, measured = env.masked_stages(), choices.value(STAGES.name)
    for device, prior in LARGEST_PACKED_SHARE.items():
        table = prior if ordered is None else ordered
        steps = ", ".join(f"{share:.0%} from {sites} sites" for sites, share in table.items())
        sparse = "lists of active sites" if device == "cuda" else "packed rows"
        why = " (ordered by RCMSTR_FAST_MASKED_STAGES)" if ordered is not None else " (before a run is tuned)"
        chosen = f"{sparse} up to an active share of {steps}; dense x mask above" if table else "dense x mask"
        if ordered is None and measured not in (None, _BY_TABLE):
            chosen, why = _shown(measured), " (measured)"
        lines.append(f"masked pass on {device}: {chosen}{why}")
    return lines
