"""Plots of docs/performance.md: small SVG files, one a machine and subject."""

from pathlib import Path
from typing import Any

from bench.records import Records, rows_of
from bench.records import steps as steps_of

Row = dict[str, Any]


def write(records: Records, folder: Path) -> list[Path]:
    """Draw what the records hold.

    Args:
        records: of `records.load`.
        folder: of the plots; created.
    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.hashsalt": "rcmstr_fast", "svg.fonttype": "none", "font.size": 9}
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for machine in records:
        for name, draw in (("masked-pass", masked_pass), ("steps", steps), ("loss", loss)):
            figure = draw(records, machine)
            if figure is not None:
                path = folder / f"{name}-{machine}.svg"
                figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
                made.append(path)
    return made


def _axes(title: str, x: str, y: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3))
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def masked_pass(records: Records, machine: str) -> Any:
    """Speed of the sparse pass over the dense one by mask ratio, a line a stage; None without records."""
    rows = [r for r in rows_of(records, machine, "masked-pass", "gpu-masked-pass") if r["status"] == "ok"]
    if not rows:
        return None
    figure, axes = _axes(f"masked pass, {machine}", "hidden share", "times as fast as dense x mask")
    for kind in dict.fromkeys((r["stage"], r["width"], r["dtype"]) for r in rows):
        line = sorted((r["mask_ratio"], r["ratio"]) for r in rows if (r["stage"], r["width"], r["dtype"]) == kind)
        axes.plot(*zip(*line, strict=True), marker="o", markersize=3, label=f"{kind[0]}, width {kind[1]}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.legend(fontsize=6, ncol=2)
    return figure


def steps(records: Records, machine: str) -> Any:
    """Images/s by batch, a line a provider and network; None without several batches."""
    rows = [r for r in steps_of(records, machine) if r.get("status") == "ok" and r["method"] == "rcmstr"]
    if len({r["batch"] for r in rows}) < 2:
        return None
    figure, axes = _axes(f"whole steps, {machine}", "batch", "images/s")
    for kind in dict.fromkeys((r["encoder"], r["provider"]) for r in rows):
        best: dict[int, float] = {}
        for r in (r for r in rows if (r["encoder"], r["provider"]) == kind):
            best[r["batch"]] = max(best.get(r["batch"], 0.0), r["images_per_s"])
        axes.plot(*zip(*sorted(best.items()), strict=True), marker="o", markersize=3, label=" ".join(kind))
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=6)
    return figure


def loss(records: Records, machine: str) -> Any:
    """Loss of the real run by step, before and after the resumption; None without one."""
    parts = [r for r in rows_of(records, machine, "gpu-real") if r.get("metrics")]
    if not parts:
        return None
    figure, axes = _axes(f"a real run, {machine}", "step", "loss")
    for part in parts:
        line = [(m["step"], m["loss"]) for m in part["metrics"] if m.get("loss") is not None]
        if line:
            axes.plot(*zip(*line, strict=True), label=part["what"])
    axes.legend(fontsize=6)
    return figure
