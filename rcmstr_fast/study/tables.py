"""Tables of a study's record: mean and deviation over seeds, the paper's numbers beside them; Markdown, CSV, LaTeX."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rcmstr_fast.evaluation import published
from rcmstr_fast.evaluation.report import markdown

Json = dict[str, Any]

#: Metric -> its name in tables and plots.
HEADS = {
    "accuracy": "accuracy",
    "ed1": "ED1",
    "ned": "1-NED",
    "cer": "CER",
    "wer": "WER",
    "iou": "foreground IoU",
    "mean_iou": "mean IoU",
}
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: what it shows.
        head: names of the columns.
        rows: cells, as many as the head.
        quoted: for each row whether it is a paper's, not ours.
        note: under the table.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    quoted: list[bool]
    note: str = ""

    def to_markdown(self) -> str:
        """Title, table and note."""
        rows = [[f"*{c}*" if quoted and c else c for c in row] for row, quoted in zip(self.rows, self.quoted)]
        return f"{self.title}\n\n{markdown(self.head, rows)}" + (f"\n\n{self.note}" if self.note else "")

    def to_csv(self) -> str:
        """Title in the first column of every line, for several tables in one file."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["table", *self.head, "source"])
        for row, quoted in zip(self.rows, self.quoted):
            writer.writerow([self.title, *row, "paper" if quoted else "here"])
        return out.getvalue()

    def to_latex(self) -> str:
        """A tabular environment with booktabs rules."""
        lines = [
            rf"% {self.title}",
            rf"\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}",
            r"\toprule",
            " & ".join(map(_latex, self.head)) + r" \\",
            r"\midrule",
        ]
        for row, quoted in zip(self.rows, self.quoted):
            cells = [rf"\textit{{{_latex(c)}}}" if quoted and c else _latex(c) for c in row]
            lines.append(" & ".join(cells) + r" \\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex(text: str) -> str:
    for character in "\\&%$#_{}":
        text = text.replace(character, r"\textbackslash{}" if character == "\\" else "\\" + character)
    return text.replace("±", r"$\pm$")


def spread(values: Sequence[float]) -> str:
    """Mean, and the sample deviation where there are several, of fractions; in percent."""
    mean = f"{100 * statistics.fmean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.2f}"


def tables(record: Json) -> list[Table]:
    """A table for each evaluation, metric and protocol of a record."""
    made = []
    for evaluation in record["evaluations"]:
        name = evaluation["name"]
        results = {row["name"]: row["results"].get(name, {}) for row in record["rows"]}
        found = [r for by_seed in results.values() for r in by_seed.values() if r]
        protocols = list(dict.fromkeys(s.get("protocol", "") for r in found for s in r["sets"]))
        present = {metric for r in found for s in r["sets"] for metric in s["score"] if metric != "count"}
        wanted = record.get("metrics") or (["iou", "mean_iou"] if "iou" in present else ["accuracy"])
        for protocol in protocols:
            for metric in [m for m in wanted if m in present]:
                made.append(_table(record, evaluation, results, protocol, metric))
        if not found and any(results.values()):
            rows = [[row["name"], UNFINISHED] for row in record["rows"] if results[row["name"]]]
            made.append(Table(f"{name}", ["row", "state"], rows, [False] * len(rows)))
    return made


def _table(record: Json, evaluation: Json, results: dict[str, Json], protocol: str, metric: str) -> Table:
    chosen = {
        row: {seed: _by_set(r, protocol, metric) for seed, r in by_seed.items() if r}
        for row, by_seed in results.items()
    }
    columns = list(dict.fromkeys(s for by_seed in chosen.values() for sets in by_seed.values() for s in sets))
    numbers = _numbers(results, protocol)
    head = ["row", "seeds", *(f"{name} ({numbers[name]})" for name in columns), *(["mean"] if len(columns) > 1 else [])]
    rows, quoted = [], []
    for row in record["rows"]:
        planned, by_seed = results[row["name"]], chosen[row["name"]]
        if not planned:
            continue
        seeds = f"{len(by_seed)}" if len(by_seed) == len(planned) else f"{len(by_seed)} of {len(planned)}"
        cells = [_cell([sets[c] for sets in by_seed.values() if c in sets]) for c in columns]
        means = [sum(sets.values()) / len(sets) for sets in by_seed.values() if len(sets) == len(columns)]
        rows.append([row["name"], seeds, *cells, *([_cell(means)] if len(columns) > 1 else [])])
        quoted.append(False)
        paper = _paper(record, row, evaluation, metric)
        if paper is not None and any(c in paper.values for c in columns):
            complete = len(columns) > 1 and set(columns) == set(paper.values)
            values = [paper.values.get(c) for c in columns] + (
                [paper.average if complete else None] * (len(columns) > 1)
            )
            rows.append([f"{row['name']}, paper", "", *("" if v is None else f"{v:.2f}" for v in values)])
            quoted.append(True)
    title = f"{evaluation['name']}: {HEADS.get(metric, metric)} in %" + (f", protocol {protocol}" if protocol else "")
    return Table(title, head, rows, quoted, _note(record) if any(quoted) else "")


def _cell(values: list[float]) -> str:
    return spread(values) if values else UNFINISHED


def _by_set(result: Json, protocol: str, metric: str) -> dict[str, float]:
    return {
        s["set"]: s["score"][metric]
        for s in result["sets"]
        if s.get("protocol", "") == protocol and metric in s["score"]
    }


def _numbers(results: dict[str, Json], protocol: str) -> dict[str, str]:
    """set -> `N kept / total`, with every value where runs differ."""
    found: dict[str, dict[str, None]] = {}
    for by_seed in results.values():
        for result in by_seed.values():
            for s in (result or {"sets": []})["sets"]:
                if s.get("protocol", "") == protocol:
                    text = f"N {s['score'].get('count', s['total'])}/{s['total']}"
                    found.setdefault(s["set"], {})[text] = None
    return {name: ", ".join(texts) for name, texts in found.items()}


def _paper(record: Json, row: Json, evaluation: Json, metric: str) -> published.PublishedRow | None:
    if not record["table"] or not row["published"] or metric not in ("accuracy", "iou"):
        return None
    table = published.table(record["table"])
    return table.find(row["published"], encoder=record["encoder"], decoder=evaluation["decoder"])


def _note(record: Json) -> str:
    table = published.table(record["table"])
    return f"Rows named paper: {table.source}, {table.place}." + (f" {table.note}" if table.note else "")


def paper_table(record: Json) -> Table | None:
    """The paper's own rows of a record's methods with all its columns; None where the record names no table."""
    if not record["table"]:
        return None
    table = published.table(record["table"])
    wanted = {row["published"] for row in record["rows"] if row["published"]}
    decoders = {e["decoder"] for e in record["evaluations"]}
    found = [
        r
        for r in table.rows
        if r.key in wanted and record["encoder"] in ("", r.encoder) and ("" in decoders or r.decoder in ("", *decoders))
    ]
    rows = [
        [
            f"{r.name} {r.decoder}".strip(),
            *("" if c not in r.values else f"{r.values[c]:.2f}" for c in table.columns),
            "" if r.average is None else f"{r.average:.2f}",
        ]
        for r in found
    ]
    title = f"What the paper prints: {table.title} ({table.metric})"
    return Table(title, ["row", *table.columns, "mean"], rows, [True] * len(rows), f"{table.source}, {table.place}.")


def cost_table(record: Json) -> Table | None:
    """What each row cost: images, steps, processor minutes; a column in which nothing is known is left out."""
    rows = []
    for row in record["rows"]:
        runs = [run for run in row["pretraining"].values() if run["steps"]]
        timed = [run["cpu_seconds"] for run in runs if run["cpu_seconds"]]
        probes = [r["cpu_seconds"] for by in row["results"].values() for r in by.values() if r and r.get("cpu_seconds")]
        if runs or probes:
            rows.append(
                [
                    row["name"],
                    str(max((run["images"] or 0 for run in runs), default=0)),
                    str(max((run["steps"] or 0 for run in runs), default=0)),
                    f"{statistics.fmean(timed) / 60:.1f}" if timed else "",
                    f"{statistics.fmean(probes) / 60:.1f}" if probes else "",
                ]
            )
    if not rows:
        return None
    head = ["row", "images seen", "steps", "processor min of pretraining", "processor min of an evaluation"]
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    rows = [[row[i] for i in kept] for row in rows]
    return Table("What it cost", [head[i] for i in kept], rows, [False] * len(rows))
