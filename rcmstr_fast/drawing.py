"""Every drawing of the package (matplotlib): curves, bars, points, pictures with what is laid over them."""

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rcmstr_fast.fields import ConfigError

Points = Sequence[tuple[float, float]]


def _figure(width: float, height: float) -> Any:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    matplotlib.rcParams |= {"svg.hashsalt": "rcmstr_fast", "svg.fonttype": "none", "font.size": 9}
    return Figure(figsize=(width, height), layout="constrained")


def _needed(width: float, height: float) -> Any:
    figure = _figure(width, height)
    if figure is None:
        raise ConfigError("plots need matplotlib: pip install rcmstr-fast[features]")
    return figure


def write(figure: Any, stem: Path) -> list[Path]:
    """Write a figure as STEM.svg and STEM.png; their paths.

    Args:
        figure: of one of the functions here.
        stem: path without ending, in a folder that exists.
    """
    paths = [stem.with_name(f"{stem.name}{ending}") for ending in (".svg", ".png")]
    paths[0].write_text(_svg(figure), encoding="utf-8")
    figure.savefig(paths[1], dpi=150, metadata={"Software": None})
    return paths


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
    figure = _figure(7.5, max(3.6, 0.6 + 0.19 * len(lines)))  # as high as the legend
    if not lines or figure is None:
        return None
    _curves_on(figure.add_subplot(title=title, xlabel=x, ylabel=y), lines)
    return _svg(figure)


def _curves_on(axes: Any, lines: Mapping[str, Points], legend: bool = True) -> None:
    for i, (name, points) in enumerate(lines.items()):
        if not points:
            continue
        style = ("-", "--", ":", "-.")[i // 10 % 4]
        marker = "o" if len(points) < 12 else None
        axes.plot(*zip(*points), style, marker=marker, markersize=4, color=f"C{i % 10}", label=name, linewidth=1.4)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    _open(axes)


def _open(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


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
        end = max([*values, mean]), place
        axes.annotate(f"{mean:.1f}", end, (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(list(places), list(rows))
    axes.set_xlim(0, 1.12 * max(max(values) for values in rows.values()) or 1)
    _open(axes)
    return _svg(figure)


def curve_panels(x: str, panels: Mapping[str, Mapping[str, Points]]) -> Any:
    """A figure with a plot for each panel below each other, and one legend for all.

    Args:
        x: name of the common horizontal axis, with its unit.
        panels: name of the vertical axis -> name of the line -> points; a name has one colour in all panels.
    Raises:
        ConfigError: matplotlib is missing.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    rows = -(-len(panels) // 2)
    columns = min(2, len(panels))
    figure = _needed(4.6 * columns, 2.7 * rows + 0.3 * len(names) + 0.2)
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (y, lines) in zip(all_axes, panels.items()):
        _curves_on(axes, {name: lines.get(name, ()) for name in names}, legend=False)
        axes.set(xlabel=x, ylabel=y)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    handles: dict[str, Any] = {}
    for axes in all_axes:
        for handle, name in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=1, frameon=False, fontsize=9)
    return figure


def points(title: str, places: np.ndarray, kinds: Sequence[str], most: int = 20) -> Any:
    """A figure with coloured points; the most frequent kinds have a colour and a mark each, the others are grey.

    Args:
        title: over the plot.
        places: [n, 2].
        kinds: n names.
        most: kinds with a colour of their own.
    Raises:
        ConfigError: matplotlib is missing.
    """
    figure = _needed(7.6, 6.2)
    axes = figure.add_subplot(title=title)
    of = np.array(kinds)
    counts = {kind: int((of == kind).sum()) for kind in sorted(set(kinds))}
    shown = sorted(sorted(counts, key=lambda kind: -counts[kind])[:most])
    rest = ~np.isin(of, shown)
    if rest.any():
        label = f"{len(counts) - len(shown)} others ({int(rest.sum())})"
        axes.scatter(*places[rest].T, s=9, color="#c8c8c8", label=label, linewidths=0)
    for i, kind in enumerate(shown):
        mark, colour = "osD^v"[i // 10 % 5], f"C{i % 10}"
        axes.scatter(*places[of == kind].T, s=16, marker=mark, color=colour, label=f"{kind} ({counts[kind]})", lw=0)
    axes.set(xticks=[], yticks=[])
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=10,
        markerscale=1.8,
        title="character (frames)",
        ncols=1 if len(shown) <= 22 else 2,
    )
    return figure


def heat_rows(title: str, image: np.ndarray, rows: Sequence[tuple[str, np.ndarray]], scale: str) -> Any:
    """A figure of a picture, and below it once more for each row, with heat laid over it.

    Args:
        title: over the picture.
        image: [H, W, 3] uint8.
        rows: (text beside the picture, [h, w] shares that are stretched over it).
        scale: what the colours mean.
    Raises:
        ConfigError: matplotlib is missing.
    """
    height, width = image.shape[:2]
    across = min(4.6, max(1.2 * width / height, 2.0))  # a square picture leaves no empty half
    each = min(across * height / width, 1.2) + 0.16
    figure = _needed(across + 2.1, each * (len(rows) + 1) + 1.0)
    all_axes = figure.subplots(len(rows) + 1, 1, squeeze=False)[:, 0]
    all_axes[0].imshow(image)
    all_axes[0].set_title(title, fontsize=11)
    top = max((float(values.max()) for _, values in rows), default=1.0) or 1.0
    drawn = None
    for axes, (text, values) in zip(all_axes[1:], rows):
        axes.imshow(image.mean(2), cmap="gray", vmin=0, vmax=255)
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        drawn = axes.imshow(values, cmap="inferno", alpha=0.6, extent=extent, vmin=0, vmax=top)
        axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=11)
    for axes in all_axes:
        axes.set(xticks=[], yticks=[])
    if drawn is not None:
        figure.colorbar(drawn, ax=list(all_axes), label=scale, shrink=0.9, aspect=30)
    return figure


def picture_grid(title: str, rows: Sequence[tuple[str, Sequence[np.ndarray]]], heads: Sequence[str], note: str) -> Any:
    """A figure with a row of pictures for each name, a head over each column, and a note below.

    Args:
        title: over all.
        rows: (name, pictures [H, W, 3] uint8).
        heads: of the columns.
        note: what is to be seen.
    Raises:
        ConfigError: matplotlib is missing.
    """
    height, width = rows[0][1][0].shape[:2]
    across = max(1.6, min(3.2, 9.0 / len(heads)))
    figure = _needed(across * len(heads) + 0.8, len(rows) * (across * height / width + 0.1) + 0.9)
    all_axes = figure.subplots(len(rows), len(heads), squeeze=False)
    for number, (line, (name, pictures)) in enumerate(zip(all_axes, rows)):
        for axes, head, picture in zip(line, heads, pictures):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
            if not number:
                axes.set_title(head, fontsize=9)
        line[0].set_ylabel(name, fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel(note, fontsize=9)
    return figure
