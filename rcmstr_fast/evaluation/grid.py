"""Semi-supervised evaluation: shares of the labels times seeds, each cell a run of its own, reported together."""

import csv
import dataclasses
import io
import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation.config import ProbeConfig, check
from rcmstr_fast.evaluation.metrics import METRICS, mean
from rcmstr_fast.evaluation.probe import probe
from rcmstr_fast.evaluation.report import RunResult, markdown
from rcmstr_fast.train.checkpoint import write_text
from rcmstr_fast.train.distributed import World, joined

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        subset: share of the training words.
        seed: of subset, split, order, augmentation and initial weights.
        config: of the run.
    """

    subset: float
    seed: int
    config: ProbeConfig


def cells_of(config: ProbeConfig, subsets: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """The runs of a grid, each in `RUN/subset-S/seed-N`; its words.json lists the records it is trained on.

    Raises:
        ConfigError: no subset or seed, one that comes twice, or a configuration that cannot be.
    """
    for name, values in (("subset", subsets), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{name} must be different numbers, at least one, got {list(values)}")
    found = []
    for subset in subsets:
        for seed in seeds:
            run = str(Path(config.run) / f"subset-{subset:g}" / f"seed-{seed}")
            cell = dataclasses.replace(config, run=run, subset=subset, seed=seed)
            check(cell)
            found.append(Cell(subset, seed, cell))
    return found


def run_grid(config: ProbeConfig, subsets: Sequence[float], seeds: Sequence[int]) -> str:
    """Run every cell that is not done, read the others back, and write `table.md`, `results.csv` and `grid.json`.

    The same command continues an interrupted grid: a finished cell is only read, a begun one goes on from its
    checkpoint.

    Args:
        config: of `rcmstr finetune` or `rcmstr probe`; `run` is the folder of the grid.
        subsets: shares of the training words.
        seeds: of each share.
    Returns:
        The table, Markdown.
    Raises:
        ConfigError: as `probe`, or the folder holds a single run.
        RunError: as `probe`.
    """
    cells, folder = cells_of(config, subsets, seeds), Path(config.run)
    if (folder / "config.yaml").exists():
        raise ConfigError(f"run: {folder} holds a single run, not a grid; name another folder")
    with joined(config.device) as world:
        results = [_cell(cell, number, len(cells), world) for number, cell in enumerate(cells)]
        text = grid_table(cells, results)
        world.on_rank0(lambda: _write(folder, cells, results, text))
    return text


def _cell(cell: Cell, number: int, count: int, world: World) -> RunResult:
    _log.info("cell %d of %d: subset %g, seed %d", number + 1, count, cell.subset, cell.seed)
    return probe(cell.config, world)


def _groups(cells: Sequence[Cell], results: Sequence[RunResult]) -> dict[tuple[float, str], list[RunResult]]:
    """(subset, protocol) -> results over seeds."""
    found: dict[tuple[float, str], list[RunResult]] = {}
    for cell, result in zip(cells, results, strict=True):
        for protocol in dict.fromkeys(entry.protocol for entry in result.sets):
            found.setdefault((cell.subset, protocol), []).append(result)
    return found


def _values(results: Sequence[RunResult], protocol: str, metric: str) -> dict[str, list[float]]:
    """Name of a set, or `mean` over sets -> the metric for each seed."""
    values: dict[str, list[float]] = {}
    for result in results:
        scores = {entry.set: entry.score for entry in result.sets if entry.protocol == protocol}
        for name, found in {**scores, "mean": mean(list(scores.values()))}.items():
            values.setdefault(name, []).append(getattr(found, metric))
    return values


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def grid_table(cells: Sequence[Cell], results: Sequence[RunResult]) -> str:
    """Accuracy in percent, mean +- sample deviation over seeds: a line for each share of the labels and protocol."""
    sets = {entry.set: f"{entry.set} (N {entry.score.count}/{entry.total})" for entry in results[0].sets}
    rows = []
    for (subset, protocol), found in _groups(cells, results).items():
        words = sorted({result.info["train_words"] for result in found})
        shown = [f"{100 * subset:g} %", "-".join(map(str, words)), str(len(found)), protocol]
        for values in _values(found, protocol, "accuracy").values():
            deviation = spread(values)
            middle = f"{100 * statistics.fmean(values):.2f}"
            shown.append(middle if deviation is None else f"{middle} +- {100 * deviation:.2f}")
        rows.append(shown)
    protocols = {entry.protocol for entry in results[0].sets}
    heads = sets.values() if len(protocols) == 1 else sets  # N differs between protocols
    return markdown(
        ["labels", "training words", "seeds", "protocol", *(f"{x} %" for x in heads), "mean %"], rows, left=4
    )


def _write(folder: Path, cells: Sequence[Cell], results: Sequence[RunResult], text: str) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["subset", "protocol", "set", "seeds", "metric", "mean", "deviation"])
    for (subset, protocol), found in _groups(cells, results).items():
        for metric in METRICS:
            for name, values in _values(found, protocol, metric).items():
                deviation = spread(values)
                shown = "" if deviation is None else f"{deviation:.6f}"
                writer.writerow([subset, protocol, name, len(values), metric, f"{statistics.fmean(values):.6f}", shown])
    facts: list[dict[str, Any]] = [
        {"subset": cell.subset, "seed": cell.seed, "run": cell.config.run, **dataclasses.asdict(result)}
        for cell, result in zip(cells, results, strict=True)
    ]
    content = {"table.md": text + "\n", "results.csv": out.getvalue(), "grid.json": json.dumps(facts, indent=1) + "\n"}
    for name, data in content.items():
        write_text(folder / name, data)
