"""Plots of the pages: small SVG files, one a machine and subject."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.report import predictions
from bench.report.performance import masked_cells
from bench.report.rows import Records, Row, best, good, group, piece

#: provider -> colour; ours stands out, eager is the grey that others are compared with
COLOURS = {"ours": "#c0392b", "sparse": "#c0392b", "eager": "#7f8c8d", "compile": "#2980b9", "compile_max": "#1f618d"}
_OTHER = "#bdc3c7"
#: (records, machine) -> a figure, or None where there is nothing to draw
Draw = Callable[[Records, str], Any]


def write(records: Records, folder: Path) -> list[Path]:
    """Draw what the records hold.

    Args:
        records: of `rows.load`.
        folder: of the plots; created.
    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "rcmstr_fast",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    draws: dict[str, Draw] = {
        "steps": steps,
        "operations": operations,
        "masked-pass": masked_pass,
        "data": data,
        "loss": loss,
    }
    made = [_save(predicted(), folder / "predicted-steps.svg")]
    for machine in records:
        for name, draw in draws.items():
            figure = draw(records, machine)
            if figure is not None:
                made.append(_save(figure, folder / f"{name}-{machine}.svg"))
    return made


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    return path


def _axes(title: str, x: str, y: str = "", height: float = 3.0) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height))
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3, axis="x" if not y else "both")
    return figure, axes


def _bars(axes: Any, groups: Sequence[tuple[str, list[tuple[str, float]]]], unit: str) -> None:
    """Groups of horizontal bars, the first group on top; each bar says its name and value."""
    place, ticks, names = 0.0, [], []
    for name, bars in groups:
        first = place
        for label, value in bars:
            axes.barh(place, value, height=0.8, color=COLOURS.get(label, _OTHER))
            axes.text(value, place, f" {label} {_short_number(value)}{unit}", va="center", fontsize=7)
            place += 1
        ticks.append((first + place - 1) / 2)
        names.append(name)
        place += 0.7
    axes.set_yticks(ticks, names)
    axes.invert_yaxis()
    axes.margins(x=0.25)


def _short_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def steps(records: Records, machine: str) -> Any:
    """Images/s of the providers, a group of bars a network and batch."""
    rows = good(group(records, machine, "step"), method="rcmstr", processes=1)
    groups = []
    for encoder, width, batch in dict.fromkeys((r["encoder"], r["width"], r["batch"]) for r in rows):
        mine = [r for r in rows if (r["encoder"], r["width"], r["batch"]) == (encoder, width, batch)]
        fastest = {name: best(mine, provider=name) for name in dict.fromkeys(r["provider"] for r in mine)}
        bars = [(name, row["images_per_s"]) for name, row in fastest.items() if row]
        groups.append((f"{encoder}\nx{width}, B={batch}", sorted(bars, key=lambda bar: -bar[1])))
    if not groups:
        return None
    figure, axes = _axes(f"whole steps, {machine}", "images/s", height=_height(groups))
    _bars(axes, groups, "")
    return figure


def _height(groups: Sequence[tuple[str, list]]) -> float:
    return 1.0 + sum(0.22 * len(bars) + 0.15 for _, bars in groups)


def operations(records: Records, machine: str) -> Any:
    """Forward and backward of each operation: how many times as fast as eager."""
    rows = good(group(records, machine, "ops"), mode="forward and backward")
    groups = []
    for operation, shape in dict.fromkeys((r["operation"], r["shape"]) for r in rows):
        mine = [r for r in rows if (r["operation"], r["shape"]) == (operation, shape)]
        eager = best(mine, provider="eager")
        if eager is None or operation == "draw_masks":
            continue
        bars = [(r["provider"], eager["ms"] / r["ms"]) for r in mine if r["provider"] in ("ours", "compile")]
        groups.append((f"{operation}\n{_short(shape)}", sorted(bars, key=lambda bar: -bar[1])))
    groups = [(name, bars) for name, bars in groups if bars]
    if not groups:
        return None
    figure, axes = _axes(
        f"operations, forward and backward, {machine}", "times as fast as eager PyTorch", height=_height(groups)
    )
    axes.axvline(1.0, color="black", linewidth=0.8)
    _bars(axes, groups, "x")
    axes.tick_params(axis="y", labelsize=7)
    return figure


def _short(shape: str) -> str:
    return shape if len(shape) < 34 else shape[:31] + ".."


def masked_pass(records: Records, machine: str) -> Any:
    """Speed of the sparse pass over the dense one by mask ratio: a line a stage, at the largest width."""
    cells = masked_cells(records, machine)
    if not cells:
        return None
    width = max(key[1] for key in cells)
    figure, axes = _axes(f"masked pass, {machine}, width {width}", "hidden share", "times as fast as dense x mask")
    dtypes = list(dict.fromkeys(key[2] for key in cells))
    stages = list(dict.fromkeys(key[0] for key in cells))
    for stage in stages:
        for dtype in dtypes:
            line = sorted((key[3], ratio) for key, ratio in cells.items() if key[:3] == (stage, width, dtype))
            if line:
                axes.plot(
                    *zip(*line, strict=True),
                    marker="o",
                    markersize=3,
                    linestyle=("-", "--")[dtypes.index(dtype) % 2],
                    color=f"C{stages.index(stage)}",
                    label=f"{stage}, {dtype}",
                    linewidth=2.5 if stage == "all" else 1.2,
                )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.legend(fontsize=6, ncol=2)
    return figure


def data(records: Records, machine: str) -> Any:
    """Images/s of the stages of the data path, on a logarithmic axis."""
    rows = good(group(records, machine, "data"))
    if not rows:
        return None
    groups: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        groups.setdefault(row["stage"], []).append((row["provider"], row["images_per_s"]))
    figure, axes = _axes(f"data path, {machine}", "images/s", height=_height([*groups.items()]))
    axes.set_xscale("log")
    _bars(axes, [*groups.items()], "")
    axes.set_xlim(right=axes.get_xlim()[1] * 100)
    return figure


def loss(records: Records, machine: str) -> Any:
    """Loss of the real run by step, before and after the resumption; None without one."""
    parts: list[Row] = [row for row in piece(records, machine, "real") if row.get("metrics")]
    if not parts:
        return None
    figure, axes = _axes(f"a real run, {machine}", "step", "loss")
    for part in parts:
        line = [(m["step"], m["loss"]) for m in part["metrics"] if m.get("loss") is not None]
        if line:
            axes.plot(*zip(*line, strict=True), label=part["what"])
    axes.legend(fontsize=6)
    return figure


def predicted() -> Any:
    """The predicted steps on an H200, stacked by part."""
    figure, axes = _axes("predicted step, H200: CNN, RCMSTR, B = 512", "ms", height=2.4)
    for number, name in enumerate(("eager", "torch.compile", "ours", "floor")):
        left = 0.0
        column = ("floor", "eager", "torch.compile", "ours").index(name)
        for colour, (part, (values, _)) in enumerate(predictions.PARTS.items()):
            axes.barh(number, values[column], left=left, color=f"C{colour}", label=part if number == 0 else None)
            left += values[column]
        axes.text(left, number, f" {left:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(4), ["eager", "torch.compile", "ours", "floor"])
    axes.invert_yaxis()
    axes.legend(fontsize=6)
    return figure
