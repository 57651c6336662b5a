"""One page of a record: self-contained HTML, Markdown, CSV and LaTeX."""

import base64
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rcmstr_fast import drawing
from rcmstr_fast.study.plan import Cell
from rcmstr_fast.study.records import curve
from rcmstr_fast.study.tables import HEADS, Table, cost_table, paper_table, tables
from rcmstr_fast.train.checkpoint import write_text

Json = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #222; --faint: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) { :root { --page: #1b1b1d; --text: #ddd; --faint: #999; --line: #444; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em;
  background: var(--page); color: var(--text); }
h1, h2 { font-weight: 600; line-height: 1.2; } h2 { margin-top: 2em; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; margin: 0.6em 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2em 0.7em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { border-bottom: 2px solid var(--faint); vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tr.paper td { color: var(--faint); font-style: italic; } .wide, figure { overflow-x: auto; }
.note, figcaption { color: var(--faint); font-size: 0.9em; } figure { margin: 1em 0; }
figcaption { position: sticky; left: 0; }
svg, img { max-width: max(100%, 600px); height: auto; } svg { min-width: 600px; } img { border: 1px solid var(--line); }
@media (max-width: 600px) {
  h1 { font-size: 1.5em; } th, td { padding: 0.2em 0.4em; }
  td:first-child { white-space: normal; min-width: 6em; }
}
"""


@dataclass
class Runs:
    """Run folders whose curves and pictures a page shows.

    Attributes:
        pretraining: name -> run folder.
        evaluation: name -> run folder.
    """

    pretraining: dict[str, Path] = field(default_factory=dict)
    evaluation: dict[str, Path] = field(default_factory=dict)


def runs_of(planned: Sequence[Cell], folder: Path) -> Runs:
    """The run folders of a study; of several seeds the first."""
    runs = Runs()
    for cell in planned:
        if cell.command == "pretrain":
            runs.pretraining.setdefault(cell.row, folder / cell.id)
        elif cell.evaluation:
            runs.evaluation.setdefault(f"{cell.evaluation} {cell.row}", folder / cell.id)
    return runs


def write_page(record: Json, runs: Runs, out: Path) -> list[Path]:
    """Write `out` (HTML) and beside it the same tables as .md, .csv and .tex.

    Args:
        record: of `study_record` or `runs_record`.
        runs: where curves and pictures come from.
        out: the HTML file; the others have its name with another ending.
    Returns:
        The files.
    """
    extra = [table for table in (paper_table(record), cost_table(record)) if table is not None]
    shown = [*tables(record), *extra]
    texts = {
        ".html": _html(record, shown, runs),
        ".md": f"# {record['title']}\n\n" + "\n\n".join(table.to_markdown() for table in shown) + "\n",
        ".csv": "\n".join(table.to_csv() for table in shown),
        ".tex": "\n\n".join(table.to_latex() for table in shown) + "\n",
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    made = []
    for suffix, text in texts.items():
        path = out.with_suffix(suffix)
        write_text(path, text)
        made.append(path)
    return made


def _html(record: Json, shown: Sequence[Table], runs: Runs) -> str:
    parts = [f"<h1>{html.escape(record['title'])}</h1>"]
    if record.get("note"):
        parts.append(f"<p>{html.escape(record['note'])}</p>")
    parts.append(f"<p class=note>{html.escape(facts(record))}</p>")
    drawn = [f"<figure>{svg}</figure>" for svg in result_bars(record).values()]
    parts += [_section("Results", [*drawn, *map(_table, shown)])]
    parts += [_section("Learning curves", _curves(runs))]
    sheets = [_image(f"{name}: what the method sees", run / "views.png") for name, run in runs.pretraining.items()]
    parts += [_section("Views, masks and reconstructions", sheets)]
    words = "words read wrong, then words read right, a few of each"
    read = [_image(f"{name}: {words}", run / "predictions.png") for name, run in runs.evaluation.items()]
    read += [_image(f"{name}: pictures segmented", run / "segments.png") for name, run in runs.evaluation.items()]
    parts += [_section("Predictions", read)]
    title = html.escape(record["title"])
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(part for part in parts if part)
    return (
        f"<!doctype html>\n<html lang=en><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def facts(record: Json) -> str:
    """How far a study is, what it cost, on what machine, from which commits; empty for single runs."""
    if "commands" not in record:
        return ""
    state = "finished" if record["done"] == record["commands"] else "not finished"
    machines = ", ".join(record["processors"]) or "no machine yet"
    commits = ", ".join(commit[:10] + "+" * commit.endswith("+") for commit in record["commits"])
    return (
        f"{record['done']} of {record['commands']} commands done ({state}); {record['cpu_minutes']} minutes of processor "
        f"time on {machines}; commit {commits}."
    )


def _section(title: str, contents: Sequence[str]) -> str:
    contents = [content for content in contents if content]
    return f"<h2>{title}</h2>\n" + "\n".join(contents) if contents else ""


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.head)
    rows = [
        f"<tr{' class=paper' if quoted else ''}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row, quoted in zip(table.rows, table.quoted)
    ]
    note = f"<p class=note>{html.escape(table.note)}</p>" if table.note else ""
    title = f"<h3>{html.escape(table.title)}</h3>"
    return f"{title}<div class=wide><table><tr>{head}</tr>{''.join(rows)}</table></div>{note}"


def result_bars(record: Json) -> dict[str, str]:
    """Evaluation -> an `<svg>` element with a bar for each row: the mean over sets of the first metric, in percent."""
    drawn = {}
    for evaluation in record["evaluations"]:
        rows: dict[str, list[float]] = {}
        metric = "accuracy"
        for row in record["rows"]:
            for result in row["results"].get(evaluation["name"], {}).values():
                sets = (result or {"sets": []})["sets"]
                metric = "iou" if sets and "iou" in sets[0]["score"] else (record.get("metrics") or ["accuracy"])[0]
                values = [s["score"][metric] for s in sets if metric in s["score"]]
                if values:
                    rows.setdefault(row["name"], []).append(100 * sum(values) / len(values))
        svg = drawing.bars(
            f"{evaluation['name']}: mean over sets, a dot a seed", f"{HEADS.get(metric, metric)} in %", rows
        )
        if svg:
            drawn[evaluation["name"]] = svg
    return drawn


def _curves(runs: Runs) -> list[str]:
    wanted = [
        ("Loss of pretraining", "step", "loss", "loss", runs.pretraining),
        ("Frames: how often the own key is the nearest", "step", "share", "accuracy_frame", runs.pretraining),
        ("Online probe while pretraining", "step", "accuracy", "probe_accuracy", runs.pretraining),
        ("Accuracy on validation words", "step", "accuracy", "val_accuracy", runs.evaluation),
        ("Segmentation of validation pictures", "step", "foreground IoU", "val_iou", runs.evaluation),
    ]
    drawn = []
    for title, x, y, name, folders in wanted:
        lines = {row: [p for p in curve(run, name) if math.isfinite(p[1])] for row, run in folders.items()}
        svg = drawing.curves(title, x, y, lines)
        drawn.append(f"<figure>{svg}</figure>" if svg else "")
    return drawn


def _image(caption: str, path: Path) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="data:image/png;base64,{data}"></figure>'
