"""Learning curves and bars of a record as SVG (matplotlib)."""

import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Points = Sequence[tuple[float, float]]


def _figure(width: float, height: float) -> Any:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    matplotlib.rcParams |= {"svg.hashsalt": "rcmstr_fast", "svg.fonttype": "none", "font.size": 9}
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def curves(title: str, x: str, y: str, lines: Mapping[str, Points]) -> str | None:
    """Several curves in one plot.

    Args:
        title: over the plot.
        x: name of the horizontal axis, with its unit.
        y: name of the vertical axis, with its unit.
        lines: name -> points; empty ones are left out.
    Returns:
        An `<svg>` element; None where there is nothing to draw or no matplotlib.
    """
    lines = {name: points for name, points in lines.items() if points}
    figure = _figure(7.5, 3.6)
    if not lines or figure is None:
        return None
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    for i, (name, points) in enumerate(lines.items()):
        style = ("-", "--", ":", "-.")[i // 10 % 4]
        marker = "o" if len(points) == 1 else None
        axes.plot(*zip(*points), style, marker=marker, color=f"C{i % 10}", label=name, linewidth=1.4)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _svg(figure)


def bars(title: str, x: str, rows: Mapping[str, Sequence[float]]) -> str | None:
    """One horizontal bar a row with its mean, and a dot for each seed.

    Args:
        title: over the plot.
        x: name of the axis, with its unit.
        rows: name -> a value for each seed, in the order from top to bottom; empty ones are left out.
    Returns:
        An `<svg>` element; None where there is nothing to draw or no matplotlib.
    """
    rows = {name: values for name, values in rows.items() if values}
    figure = _figure(7.5, 0.9 + 0.27 * len(rows))
    if not rows or figure is None:
        return None
    axes = figure.add_subplot(title=title, xlabel=x)
    places = range(len(rows) - 1, -1, -1)
    means = [statistics.fmean(values) for values in rows.values()]
    axes.barh(places, means, color="#9ecae1", height=0.7)
    for place, values, mean in zip(places, rows.values(), means):
        axes.plot(values, [place] * len(values), "o", color="#08519c", markersize=3.5)
        axes.annotate(f" {mean:.1f}", (max([*values, mean]), place), va="center", fontsize=8)
    axes.set_yticks(list(places), list(rows))
    axes.set_xlim(0, 1.12 * max(max(values) for values in rows.values()) or 1)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return _svg(figure)
