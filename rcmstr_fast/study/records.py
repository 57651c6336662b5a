"""What a study, or a list of run folders, has found so far: one plain record that pages and result files are made of."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from rcmstr_fast.config import ConfigError
from rcmstr_fast.study.plan import Cell, Study
from rcmstr_fast.study.run import read_record

Json = dict[str, Any]


def study_record(study: Study, folder: Path, planned: Sequence[Cell]) -> Json:
    """Everything a study has found.

    Args:
        study: the study.
        folder: where it ran.
        planned: its commands.
    Returns:
        A JSON object: `title`, `table`, `rows`, each with `results` (evaluation -> seed -> result, or None where that
        has not ended) and `pretraining` (seed -> facts of the run).
    """
    records = {cell.id: read_record(folder, cell.id) for cell in planned}
    done = [record for record in records.values() if record]
    return {
        "name": study.name,
        "title": study.title,
        "note": study.note,
        "table": study.table,
        "encoder": study.encoder,
        "metrics": list(study.metrics),
        "evaluations": [{"name": e.name, "decoder": e.decoder, "command": e.command} for e in study.evaluations],
        "rows": [
            {
                "name": row.name,
                "published": row.published,
                "seeds": list(study.row_seeds(row)),
                "pretraining": _pretraining(folder, row.name, planned, records),
                "results": _results(folder, row.name, planned, records),
            }
            for row in study.rows
        ],
        "commands": len(planned),
        "done": len(done),
        "processors": sorted({record["processor"] for record in done}),
        "commits": sorted({str(record["commit"]) for record in done}),
        "cpu_minutes": round(sum(record["cpu_seconds"] for record in done) / 60, 1),
    }


def _pretraining(folder: Path, row: str, planned: Sequence[Cell], records: dict[str, Json | None]) -> Json:
    found = {}
    for cell in planned:
        if cell.row == row and cell.command == "pretrain":
            record, last = records[cell.id], last_metrics(folder / cell.id)
            found[str(cell.seed)] = {
                "finished": record is not None,
                "cpu_seconds": record["cpu_seconds"] if record else None,
                "images": last.get("samples"),
                "steps": last.get("step"),
                "loss": last.get("loss"),
            }
    return found


def _results(folder: Path, row: str, planned: Sequence[Cell], records: dict[str, Json | None]) -> Json:
    found: Json = {}
    for cell in planned:
        if cell.row != row or not cell.evaluation:
            continue
        result = read_result(folder / cell.id) if records[cell.id] else None
        if result is not None:
            result = {"sets": result["sets"], "cpu_seconds": (records[cell.id] or {})["cpu_seconds"]}
        found.setdefault(cell.evaluation, {})[str(cell.seed)] = result
    return found


def read_result(run: Path) -> Json | None:
    """results.json of an evaluation run; None where it has not ended."""
    try:
        found = json.loads((run / "results.json").read_text(encoding="utf-8"))
        return found if isinstance(found["sets"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def metrics(run: Path) -> Iterator[Json]:
    """The lines of a run's metrics.jsonl; one that was cut off is passed over."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def last_metrics(run: Path) -> Json:
    """The last line of metrics.jsonl with a loss; empty where there is none."""
    last: Json = {}
    for line in metrics(run):
        last = line if "loss" in line else last
    return last


def curve(run: Path, name: str) -> list[tuple[float, float]]:
    """(step, value) of every line that has the metric."""
    return [(line["step"], line[name]) for line in metrics(run) if isinstance(line.get(name), (int, float))]


def runs_record(runs: Sequence[Path]) -> Json:
    """Run folders of pretrainings and evaluations as the record of a study; a row is a title, its runs are seeds.

    Args:
        runs: run folders.
    Raises:
        ConfigError: one is no run folder.
    """
    rows: dict[str, Json] = {}
    evaluations: dict[str, Json] = {}
    for run in runs:
        config = _config(run)
        if "method" in config:
            name, seed = run.absolute().name, str(config.get("seed", 0))
            last = last_metrics(run)
            row = rows.setdefault(name, _row(name))
            finished = f"finished at step {last.get('step')}" in _text(run / "log.txt")
            row["pretraining"][seed] = {
                "finished": finished,
                "cpu_seconds": None,
                "images": last.get("samples"),
                "steps": last.get("step"),
                "loss": last.get("loss"),
            }
            continue
        result = read_result(run)
        title = config.get("title") or run.absolute().name
        command = f"{config.get('mode', '')}"
        evaluation = f"{config.get('decoder', 'segment')} {command}"
        evaluations.setdefault(
            evaluation, {"name": evaluation, "decoder": config.get("decoder", ""), "command": command}
        )
        row = rows.setdefault(title, _row(title))
        row["results"].setdefault(evaluation, {})[str(config.get("seed", 0))] = result and {"sets": result["sets"]}
    return {
        "name": "runs",
        "title": "Runs",
        "note": "",
        "table": "",
        "encoder": "",
        "metrics": [],
        "evaluations": list(evaluations.values()),
        "rows": list(rows.values()),
    }


def _row(name: str) -> Json:
    return {"name": name, "published": "", "seeds": [], "pretraining": {}, "results": {}}


def _config(run: Path) -> Json:
    try:
        found = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{run}: expected a run folder with config.yaml, or a study file") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{run}/config.yaml: expected the configuration of a run, it is some other file")
    return found


def _text(path: Path) -> str:
    try:
        return re.sub(r"\s+", " ", path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
