"""The figures of `rcmstr plot`: what is drawn; how, `rcmstr_fast.drawing` knows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from rcmstr_fast import drawing, ops
from rcmstr_fast.config import ConfigError, DataConfig
from rcmstr_fast.data.decode import BrokenImage, decode_image
from rcmstr_fast.data.source import open_sources
from rcmstr_fast.data.table import to_tsv
from rcmstr_fast.evaluation.network_files import load_recogniser
from rcmstr_fast.evaluation.recogniser import Recogniser
from rcmstr_fast.ops.draw_masks import UNITS
from rcmstr_fast.plots.characters import character_frames, tsne
from rcmstr_fast.study.records import curve

#: Metrics that `plot curves` looks for, with the names of their axes, in their order.
CURVES = {
    "loss": "loss",
    "probe_accuracy": "online probe, accuracy",
    "probe_ned": "online probe, 1-NED",
    "accuracy_word": "own key is the nearest, words",
    "accuracy_frame": "own key is the nearest, frames",
    "val_accuracy": "accuracy on validation words",
    "val_ned": "1-NED on validation words",
    "val_iou": "foreground IoU on validation pictures",
    "val_mean_iou": "mean IoU on validation pictures",
    "lr": "learning rate",
}


def stem_of(out: str) -> Path:
    """The path without .svg or .png; its folder must exist.

    Raises:
        ConfigError: the folder does not exist.
    """
    path = Path(out)
    path = path.with_suffix("") if path.suffix in (".svg", ".png") else path
    if not path.name or not path.absolute().parent.is_dir():
        raise ConfigError(f"out must be a file in a folder that exists, got {out!r}")
    return path


def curves_figure(runs: Sequence[str], metrics: Sequence[str] = ()) -> Any:
    """Metrics over the steps of runs, a panel each.

    Args:
        runs: run folders.
        metrics: their names in metrics.jsonl; empty: those of `CURVES` that there are.
    Raises:
        ConfigError: a folder has no metrics, or none of these.
    """
    names = {run: (Path(run).name if [Path(r).name for r in runs].count(Path(run).name) == 1 else run) for run in runs}
    for run in runs:
        if not (Path(run) / "metrics.jsonl").is_file():
            raise ConfigError(f"expected a run folder with metrics.jsonl, got {run}")
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for metric in metrics or CURVES:
        lines = {names[run]: points for run in runs if (points := curve(Path(run), metric))}
        if lines:
            panels[CURVES.get(metric, metric)] = lines
        elif metrics:
            raise ConfigError(f"metric {metric} is in none of {', '.join(runs)}")
    if not panels:
        raise ConfigError(f"{', '.join(runs)}: expected lines of metrics, there are none yet")
    return drawing.curve_panels("step", panels)


def tsne_figure(
    recogniser: str,
    images: Sequence[str],
    stem: Path,
    *,
    most: int,
    perplexity: float,
    seed: int,
    misread: bool,
    colours: int,
) -> Any:
    """Frames of words in a plane, coloured by their characters; the points are also written to STEM.tsv.

    Args:
        recogniser: run folder of a probe.
        images: folders or LMDBs of words.
        stem: path of the figure without ending.
        most: frames.
        perplexity: of t-SNE.
        seed: of t-SNE.
        misread: also frames of words that are read wrongly.
        colours: characters with a colour of their own.
    """
    network, _ = load_recogniser(recogniser)
    found = character_frames(network, open_sources(list(images)), most=most, misread=misread)
    places = tsne(found.features, perplexity=perplexity, seed=seed)
    rows = [[w, c, f"{x:.4f}", f"{y:.4f}"] for w, c, (x, y) in zip(found.words, found.characters, places)]
    text = to_tsv([["picture", "character", "x", "y"], *rows])
    stem.with_name(f"{stem.name}.tsv").write_bytes(text.encode("utf-8", "surrogateescape"))
    wrong = f"{found.counts['misread']} misread {'among them' if misread else 'left out'}"
    title = f"t-SNE of {len(places)} frames of {found.counts['used']} words ({wrong})"
    return drawing.points(title, places, found.characters, colours)


def attention_figure(recogniser: str, image: str) -> Any:
    """Where the decoder looks for each character of a picture.

    Args:
        recogniser: run folder of a probe.
        image: a picture.
    Raises:
        ConfigError: an unusable picture or recogniser, or nothing was read.
    """
    network, _ = load_recogniser(recogniser)
    pixels = _pixels(image, network.size, network.rotate)
    with torch.no_grad():
        frames = network.frames(network.views(torch.from_numpy(pixels)[None], index=torch.zeros(1, dtype=torch.int64)))
    trace = network.trace(frames)
    text = network.texts(trace.ids)[0]
    if not text or trace.attention is None:
        raise ConfigError(f"{image}: the recogniser reads nothing in it")
    special = network.decoder.num_special
    written = (trace.ids[0] >= special).nonzero()[: len(text), 0]
    rows = [
        (f"{character}  {100 * float(trace.probabilities[0, place]):.0f} %", _over_picture(network, trace, int(place)))
        for character, place in zip(text, written)
    ]
    title = f"{Path(image).name}: “{text}”, {100 * float(trace.confidence[0]):.0f} %"
    return drawing.heat_rows(title, pixels, rows, "share of the character's attention")


def _over_picture(network: Recogniser, trace: Any, place: int) -> np.ndarray:
    """Attention [h, w] of a character: over patches, or over frames from left to right."""
    shares = trace.attention[0, place].float().cpu().numpy()
    grid = getattr(network.encoder, "grid", (1, len(shares)))
    return shares.reshape(grid if grid[0] * grid[1] == len(shares) else (1, -1))


def masks_figure(
    images: Sequence[str],
    *,
    run: str = "",
    unit: str = "token",
    mask_ratio: float = 0.7,
    num_blocks: int = 1,
    draws: int = 3,
    seed: int = 0,
) -> Any:
    """What masked image modelling hides of pictures.

    Args:
        images: pictures.
        run: run folder of a pretraining, whose masks are shown; empty: those of the next arguments.
        unit: token, lattice, stage3 or column.
        mask_ratio: hidden share of the units.
        num_blocks: hidden blocks of 16 pixels, full height.
        draws: masks of each picture.
        seed: of the masks.
    Raises:
        ConfigError: unusable pictures, or a run without masks.
    """
    size = (32, 128 if unit == "token" else 100)
    if run:
        unit, mask_ratio, num_blocks, size, seed = _masks_of(run)
    if unit not in UNITS or not 0 <= mask_ratio <= 1 or num_blocks < 0 or draws < 1:
        raise ConfigError(
            f"expected a unit of {', '.join(UNITS)}, mask_ratio 0 to 1, num_blocks from 0 and draws from 1, got "
            f"{unit}, {mask_ratio}, {num_blocks}, {draws}"
        )
    index = torch.arange(len(images))
    rows: list[tuple[str, list[np.ndarray]]] = []
    shares = []
    pictures = [_pixels(image, size, "never") for image in images]
    drawn = [
        ops.draw_masks(index, seed=seed, epoch=i, size=size, unit=unit, mask_ratio=mask_ratio, num_blocks=num_blocks)
        for i in range(draws)
    ]
    for i, (image, pixels) in enumerate(zip(images, pictures)):
        line = [pixels]
        for masks in drawn:
            hidden = masks.pixels[i, 0].numpy()
            shares.append(hidden.mean())
            line.append(np.where(hidden[..., None], np.uint8(128), pixels))
        rows.append((Path(image).name[:18], line))
    heads = ["picture", *(f"epoch {i}" for i in range(draws))]
    title = f"masks of unit {unit}: {100 * mask_ratio:.0f} % of the units and {num_blocks} block(s)"
    return drawing.picture_grid(title, rows, heads, f"grey: hidden, {100 * float(np.mean(shares)):.0f} % on average")


def _masks_of(run: str) -> tuple[str, float, int, tuple[int, int], int]:
    """Unit, ratio, blocks, (H, W) and seed of a pretraining run."""
    try:
        held = yaml.safe_load((Path(run) / "config.yaml").read_text(encoding="utf-8"))
        method, model = held["method"], held["model"]
        unit = "token" if model["encoder"].startswith("vit") else method["mask_unit"]
        size = int(model["height"]), int(model["image_width"])
        return unit, float(method["mask_ratio"]), int(method["num_blocks"]), size, int(held["seed"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"expected the run folder of a pretraining with masks, got {run} ({error!r:.80})") from error


def _pixels(image: str, size: tuple[int, int], rotate: Any) -> np.ndarray:
    """A picture at the input size, [H, W, 3] uint8."""
    limits = DataConfig()
    try:
        data = Path(image).read_bytes()
        return decode_image(data, *size, max_pixels=limits.max_pixels, min_side=limits.min_side, rotate=rotate)
    except BrokenImage as error:
        raise ConfigError(f"{image}: {error}") from error
