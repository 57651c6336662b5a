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


def study_record(study: Study, folder: Path, planned: Sequence[Cell], known: Json | None = None) -> Json:
    """Everything a study has found.

    Args:
        study: the study.
        folder: where it ran.
        planned: its commands.
        known: results from elsewhere by a command's id, of `known_results`; what the folder has wins over them.
    Returns:
        A JSON object: `title`, `table`, `rows`, each with `results` (evaluation -> seed -> result, or None where that
        has not ended) and `pretraining` (seed -> facts of the run).
    """
    found = {cell.id: _found(folder, cell) or (known or {}).get(cell.id) for cell in planned}
    done = [facts for cell in planned if (facts := found[cell.id]) and _ended(cell, facts)]
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
                "pretraining": {
                    str(cell.seed): facts
                    for cell in planned
                    if cell.row == row.name and not cell.evaluation and (facts := found[cell.id])
                },
                "results": _results(row.name, planned, found),
            }
            for row in study.rows
        ],
        "commands": len(planned),
        "done": len(done),
        "processors": sorted({facts["processor"] for facts in done}),
        "commits": sorted({str(facts["commit"]) for facts in done}),
        "cpu_minutes": round(sum(facts["cpu_seconds"] for facts in done) / 60, 1),
    }


def _ended(cell: Cell, facts: Json) -> bool:
    return bool(cell.evaluation or facts.get("finished"))


def _whole(cell: Cell, facts: Json) -> bool:
    """Whether facts from elsewhere hold all that a record of an ended command has."""
    has = all(isinstance(facts.get(name), str) for name in ("commit", "processor"))
    if cell.evaluation:
        sets = facts.get("sets")
        has = has and isinstance(sets, list) and all(isinstance(one, dict) and "score" in one for one in sets)
    return has and isinstance(facts.get("cpu_seconds"), (int, float)) and _ended(cell, facts)


def _found(folder: Path, cell: Cell) -> Json | None:
    """What a command has left in the study's folder: its result, or how far a pretraining is; None where it left none."""
    record = read_record(folder, cell.id) or {}
    made: Json = {name: record[name] for name in ("digest", "commit", "processor") if name in record}
    if cell.evaluation:
        result = read_result(folder / cell.id) if record else None
        return result and {"sets": result["sets"], "cpu_seconds": record["cpu_seconds"], **made}
    last = last_metrics(folder / cell.id)
    return (record or last or None) and {
        "finished": bool(record),
        "cpu_seconds": record.get("cpu_seconds"),
        "images": last.get("samples"),
        "steps": last.get("step"),
        "loss": last.get("loss"),
        **made,
    }


def _results(row: str, planned: Sequence[Cell], found: dict[str, Json | None]) -> Json:
    results: Json = {}
    for cell in planned:
        if cell.row == row and cell.evaluation:
            results.setdefault(cell.evaluation, {})[str(cell.seed)] = found[cell.id]
    return results


def known_results(path: Path, planned: Sequence[Cell]) -> Json:
    """What records of other runs, of this study or of another one, know of its commands.

    Args:
        path: of a record, as `rcmstr study --record` wrote it, or of a folder with several (.json).
        planned: the study's commands.
    Returns:
        id of a command -> its facts, where a record has it done with the same fields, recipe and data.
    Raises:
        ConfigError: a file is no record of a study, or a folder has none.
    """
    by_digest: Json = {}
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"known must name a record or a folder with records (.json), {path} has none")
    for file in files:
        by_digest |= _by_digest(file)
    same = {cell.id: facts for cell in planned if (facts := by_digest.get(cell.digest)) and _whole(cell, facts)}
    return {cell.id: same[cell.id] for cell in planned if cell.id in same and (not cell.needs or cell.needs in same)}


def _by_digest(path: Path) -> Json:
    """digest -> facts of everything that a record has."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        parts = [part for row in rows for part in (row["pretraining"], *row["results"].values())]
        return {facts["digest"]: facts for part in parts for facts in part.values() if facts and "digest" in facts}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"known must name a record that `rcmstr study --record` wrote, got {path}") from error


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
