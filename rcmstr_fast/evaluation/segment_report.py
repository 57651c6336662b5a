"""What a segmentation is reported with: IoU a set, tables, and a picture of words, truths and predictions."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation.report import markdown
from rcmstr_fast.train.checkpoint import write_text

_SCALE, _GAP, _RULE, _LINE, _COLUMNS = 2, 8, 2, 18, 3


@dataclass(frozen=True)
class MaskScore:
    """Metrics of one set, as fractions, over all of its pixels together.

    Attributes:
        count: pictures compared (N).
        iou: pixels that are text in truth and prediction, of those that are text in either.
        mean_iou: mean of that and the same of the background.
    """

    count: int
    iou: float
    mean_iou: float


#: Metrics with their heads in tables.
METRICS = {"iou": "foreground IoU %", "mean_iou": "mean IoU %"}


def overlaps(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pixels of each picture: text in both, text in either, and all; from [n, H, W] bool to [n, 3] int64."""
    axes = (1, 2)
    pixels = np.full(len(truth), truth[0].size if len(truth) else 0)
    return np.stack([(predicted & truth).sum(axes), (predicted | truth).sum(axes), pixels], axis=1).astype(np.int64)


def score_masks(counts: np.ndarray) -> MaskScore:
    """IoU out of `overlaps` [N, 3]; where neither has any text (or any background), it is 1."""
    both, either, pixels = counts.sum(0).tolist()
    text, background = _ratio(both, either), _ratio(pixels - either, pixels - both)
    return MaskScore(len(counts), text, (text + background) / 2)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


@dataclass(frozen=True)
class SegmentSet:
    """One test set.

    Attributes:
        set: its name.
        total: pairs listed, and pictures without one.
        dropped: reason -> number of these left out.
        score: over the rest.
    """

    set: str
    total: int
    dropped: dict[str, int]
    score: MaskScore


@dataclass(frozen=True)
class SegmentResult:
    """Everything one segmentation network is reported with; its JSON has the form of `report.RunResult`.

    Attributes:
        model: its name in tables.
        sets: the results.
        info: facts to keep beside them.
    """

    model: str
    sets: list[SegmentSet]
    info: dict = field(default_factory=dict)


def _lines(result: SegmentResult) -> list[tuple[str, int, int, dict[str, float]]]:
    """(set, N kept, N total, metrics) of every set, then their plain mean."""
    rows = [(s.set, s.score.count, s.total, {m: getattr(s.score, m) for m in METRICS}) for s in result.sets]
    means = {m: sum(row[3][m] for row in rows) / len(rows) for m in METRICS}
    return [*rows, ("mean", sum(row[1] for row in rows), sum(row[2] for row in rows), means)]


def segment_table(result: SegmentResult) -> str:
    """One line a set: N kept, N total, and the metrics in percent; then their mean; and what was left out."""
    rows = [[n, kept, total, *(f"{100 * v:.2f}" for v in values.values())] for n, kept, total, values in _lines(result)]
    table = markdown(["set", "N kept", "N total", *METRICS.values()], rows)
    parts = result.info.get("words", {})
    left = [[name, e["total"], e["kept"], _reasons(e["dropped"])] for name, e in parts.items()]
    left += [[s.set, s.total, s.score.count, _reasons(s.dropped)] for s in result.sets]
    return f"{table}\n\n{markdown(['pairs', 'N total', 'N kept', 'left out'], left)}"


def _reasons(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in dropped.items())


def to_csv(result: SegmentResult) -> str:
    """The same lines as comma-separated values, fractions instead of percent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "set", "n_kept", "n_total", *METRICS])
    for name, kept, total, values in _lines(result):
        writer.writerow([result.model, name, kept, total, *(f"{v:.6f}" for v in values.values())])
    return out.getvalue()


def load_segment_result(path: Path) -> SegmentResult:
    """The results of a finished run's results.json.

    Raises:
        ConfigError: it is something else.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        sets = [SegmentSet(**(entry | {"score": MaskScore(**entry["score"])})) for entry in held["sets"]]
        return SegmentResult(held["model"], sets, held["info"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: expected the results of a segmentation run ({error})") from error


@dataclass(frozen=True)
class Segmented:
    """One picture as it was segmented.

    Attributes:
        set: the test set that it is from.
        image: [H, W, 3] uint8.
        truth: [H, W] bool.
        predicted: [H, W] bool.
        iou: of the picture alone.
    """

    set: str
    image: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray
    iou: float


def segment_sheet(shown: Sequence[Segmented]) -> Image.Image:
    """Each picture over its true mask and the predicted one, worst IoU first.

    In the prediction text that is there is white, text that was missed blue, and what is no text red.

    Args:
        shown: at least one, all of one size.
    Returns:
        An RGB picture with its legend.
    """
    shown = sorted(shown, key=lambda one: one.iou)
    height, width = (side * _SCALE for side in shown[0].image.shape[:2])
    columns = min(_COLUMNS, len(shown))
    cell = width + _GAP, 3 * (height + _RULE) + _LINE + 2 * _GAP
    size = max(columns * cell[0] + _GAP, 620), -(-len(shown) // columns) * cell[1] + _LINE + 2 * _GAP
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    x = _GAP
    for colour, words in (
        ((0, 0, 0), "picture, truth, prediction from top to bottom:"),
        ((255, 255, 255), "right text"),
        ((70, 130, 255), "missed"),
        ((225, 60, 60), "no text"),
    ):
        if words[0] != "p":
            draw.rectangle((x, _GAP, x + 13, _GAP + 13), fill=colour, outline=(90, 90, 90))
            x += 18
        draw.text((x, _GAP - 1), words, fill=(40, 40, 40), font=font)
        x += int(draw.textlength(words, font=font)) + 16
    for i, one in enumerate(shown):
        x, y = _GAP + i % columns * cell[0], _LINE + 2 * _GAP + i // columns * cell[1]
        for row, pixels in enumerate((one.image, _white(one.truth), _compared(one))):
            part = Image.fromarray(np.ascontiguousarray(pixels)).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(part, (x, y + row * (height + _RULE)))
        text = f"{one.set}: IoU {100 * one.iou:.1f} %"
        draw.text((x, y + 3 * (height + _RULE)), text, fill=(40, 40, 40), font=font)
    return sheet


def _white(mask: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(mask, np.uint8(255), np.uint8(0))[..., None], 3, axis=2)


def _compared(one: Segmented) -> np.ndarray:
    pixels = _white(one.truth & one.predicted)
    pixels[one.truth & ~one.predicted] = (70, 130, 255)
    pixels[~one.truth & one.predicted] = (225, 60, 60)
    return pixels


def write_segment_results(folder: Path, result: SegmentResult, shown: Sequence[Segmented]) -> None:
    """segments.png, table.md, results.csv and, last, results.json, which marks the run as finished."""
    if shown:
        segment_sheet(shown).save(folder / "segments.png")
    means = dict(zip(METRICS, _lines(result)[-1][3].values()))
    content = json.dumps(asdict(result) | {"means": {"": {"mean": means}}}, indent=2, ensure_ascii=False) + "\n"
    texts = {"table.md": segment_table(result) + "\n", "results.csv": to_csv(result), "results.json": content}
    for name, text in texts.items():
        write_text(folder / name, text)
