"""A study file: which pretrainings, evaluations and seeds there are, and the commands that make them.

The file holds rows (what a table's lines are) and evaluations (what is done with the encoder of each row). A row times a
seed is a pretraining; that times an evaluation is a result. Every one of them is a command of `rcmstr` with a run folder
of its own, so a study is only a list of commands, and what has been done is seen from the folders.
"""

import difflib
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from rcmstr_fast.config import ConfigError

#: Commands that an evaluation may be; their fields `encoder`, `run`, `title` and `seed` are the study's business.
COMMANDS = ("probe", "finetune", "segment")
_TAKEN = ("run", "title", "seed", "encoder", "like")


@dataclass(frozen=True)
class Row:
    """A line of the tables: one way to get an encoder.

    Attributes:
        name: as tables show it; unique.
        recipe: name of a recipe, or a YAML file; empty: no pretraining.
        encoder: where there is no recipe: `random`, or an encoder file or run folder.
        like: row whose network an encoder=random takes; empty: the evaluation's own `model`.
        set: fields of the pretraining over those of the recipe and of the study.
        evaluate: fields of every evaluation of this row.
        evaluations: names of those that this row has; empty: all.
        seeds: of this row; empty: those of the study.
        published: key of the row in the paper's table; empty: the paper has none.
    """

    name: str
    recipe: str = ""
    encoder: str = ""
    like: str = ""
    set: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    evaluations: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    published: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What is done with each encoder.

    Attributes:
        name: as tables show it; unique.
        command: probe, finetune or segment.
        set: its fields.
        decoder: of the paper's rows that stand beside (ctc, attention, transformer); empty: any.
    """

    name: str
    command: str = "probe"
    set: dict[str, Any] = field(default_factory=dict)
    decoder: str = ""


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        name: of the study, and of its folder.
        title: what it compares.
        rows: lines of the tables, in their order.
        evaluations: columns of the tables, in their order.
        seeds: of every row that names none.
        pretrain: fields of every pretraining, over those of the recipes.
        evaluate: fields of every evaluation, below those of the evaluation and of the row.
        data: name -> path, or what to render (fields of `rcmstr data synth`); values of fields name them as `{name}`.
        table: name of the paper's table (`rcmstr_fast.evaluation.published`); empty: none.
        encoder: cnn or vit, of the paper's rows; empty: any.
        note: what a reader must know; printed under the table.
        metrics: columns of the tables (accuracy, ed1, ned, cer, wer, iou, mean_iou); empty: the main one.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    evaluations: tuple[Evaluation, ...]
    seeds: tuple[int, ...] = (0,)
    pretrain: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    table: str = ""
    encoder: str = ""
    note: str = ""
    metrics: tuple[str, ...] = ()

    def row_seeds(self, row: Row) -> tuple[int, ...]:
        """The seeds of a row."""
        return tuple(row.seeds) or self.seeds


@dataclass(frozen=True)
class Cell:
    """One command of a study.

    Attributes:
        id: names its run folder below the study's folder: `pretrain/NAME-s0`, `CTC/NAME-s0`.
        row: name of its row.
        seed: its seed.
        command: of `rcmstr`.
        evaluation: name of the evaluation; empty for a pretraining.
        config: YAML file it starts from; None: none.
        values: its fields.
        needs: id of the pretraining whose encoder it takes; empty: none.
        digest: of all that its result depends on (recipe, fields, what data and the encoder it needs are made of), so
            that the same command is known in another folder, row or study.
    """

    id: str
    row: str
    seed: int
    command: str
    evaluation: str
    config: Path | None
    values: dict[str, Any]
    needs: str = ""
    digest: str = ""

    def arguments(self) -> list[str]:
        """The words of the command line after `rcmstr`."""
        words = [self.command, *(["--config", str(self.config)] if self.config else [])]
        for name, value in self.values.items():
            text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6)
            words.append(f"--{name}={text.removesuffix('...' + chr(10)).strip()}")
        return words


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping, unless a key comes twice."""
        merge = "tag:yaml.org,2002:merge"  # `<<: *anchor`, whose fields may come again
        names = [self.construct_object(key, deep=deep) for key, _ in node.value if key.tag != merge]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise ConfigError(f"line {node.start_mark.line + 1}: {twice} stands twice")
        return super().construct_mapping(node, deep=deep)


def read_study(path: Path) -> Study:
    """Read and check a study file.

    Args:
        path: of the YAML file. With `base: NAME` it takes the fields that it does not give from NAME.yaml beside it.
    Raises:
        ConfigError: naming the file and what is wrong in it.
    """
    try:
        return _study(_fields(path), path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _fields(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields of a file over those of its base, without the base's name."""
    found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    if not isinstance(found, dict):
        raise ConfigError(f"expected a mapping with rows and evaluations, got {type(found).__name__}")
    base = found.pop("base", None)
    if base is None:
        return found
    beside = path.with_name(f"{base}.yaml")
    if not beside.is_file() or beside in (path, *above):
        raise ConfigError(f"base must name another study in the same folder, got {base!r}")
    return {**{k: v for k, v in _fields(beside, (path, *above)).items() if k != "name"}, **found}


def _study(found: dict[str, Any], path: Path) -> Study:
    found = {"name": path.stem, "title": path.stem, **found}
    for name in ("rows", "evaluations"):
        if not isinstance(found.get(name), list) or not found[name]:
            raise ConfigError(f"{name} must be a list of one or more, got {found.get(name)!r}")
    rows = [row for entry in found["rows"] for row in _expanded(entry)]
    found["rows"] = tuple(_made(Row, row, "rows") for row in rows)
    found["evaluations"] = tuple(_made(Evaluation, entry, "evaluations") for entry in found["evaluations"])
    for name in ("seeds", "metrics"):
        found[name] = tuple(found.get(name, (0,) if name == "seeds" else ()))
    study = _made(Study, found, "the study")
    _check(study)
    return study


def _made(cls: type, entry: Any, place: str) -> Any:
    """`entry` as the dataclass, whose fields it may name and no others."""
    if not isinstance(entry, dict):
        raise ConfigError(f"{place}: expected fields, got {entry!r}")
    known = {f.name: f for f in fields(cls)}
    for name, value in entry.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ConfigError(f"{place}: unknown field {name}" + (f"; did you mean {near[0]}?" if near else ""))
        kind = {"dict": dict, "list": list}.get(str(known[name].type).split("[")[0].rpartition(".")[2])
        if kind and not isinstance(value, kind):
            raise ConfigError(f"{place}: {name} must be a {kind.__name__}, got {value!r}")
    if "name" not in entry:
        raise ConfigError(f"{place}: name must be given, got {sorted(entry)}")
    return cls(**entry)


def _expanded(entry: Any) -> Iterator[Any]:
    """A row with `grid: {field: [values]}` is a row for each combination; `{field}` in its name is the value."""
    if not isinstance(entry, dict) or "grid" not in entry:
        yield entry
        return
    grid = entry["grid"]
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise ConfigError(f"rows: grid must be a mapping of fields to lists, got {grid!r}")
    base = {name: value for name, value in entry.items() if name != "grid"}
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values))
        name = str(base.get("name", ""))
        for key, value in chosen.items():
            name = name.replace("{" + key + "}", str(value))
        yield {**base, "name": name, "set": {**base.get("set", {}), **chosen}}


def _check(study: Study) -> None:
    for kind, names in (("rows", [r.name for r in study.rows]), ("evaluations", [e.name for e in study.evaluations])):
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise ConfigError(f"{kind} must have different names, got {twice!r} twice")
    folders = [_slug(r.name) for r in study.rows]
    if len(set(folders)) < len(folders):
        raise ConfigError("rows must differ in letters, digits or dots, the names of their folders")
    _check_rows(study)
    _check_evaluations(study)
    for seed in [s for row in study.rows for s in study.row_seeds(row)]:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seeds must be whole numbers of 0 or more, got {seed!r}")


def _check_rows(study: Study) -> None:
    for row in study.rows:
        if bool(row.recipe) == bool(row.encoder):
            raise ConfigError(f"row {row.name}: expected either recipe or encoder, got {row.recipe!r}, {row.encoder!r}")
        if row.like and row.like not in [other.name for other in study.rows if other.recipe]:
            raise ConfigError(f"row {row.name}: like must name a row with a recipe, got {row.like!r}")
        other = next((name for name in row.evaluations if name not in [e.name for e in study.evaluations]), None)
        if other is not None:
            raise ConfigError(f"row {row.name}: evaluations must name evaluations of the study, got {other!r}")


def _check_evaluations(study: Study) -> None:
    for evaluation in study.evaluations:
        if evaluation.command not in COMMANDS:
            raise ConfigError(
                f"evaluation {evaluation.name}: command must be one of {', '.join(COMMANDS)}, got {evaluation.command}"
            )
        taken = next((name for name in _TAKEN if name in {**study.evaluate, **evaluation.set}), None)
        if taken:
            raise ConfigError(f"evaluation {evaluation.name}: {taken} is set by the study, not in its file")


def _slug(name: str) -> str:
    """A row's or evaluation's name as a part of a path."""
    return "".join(c if c.isalnum() or c in ".-_+" else "_" for c in name)


def cells(study: Study, folder: Path, data: dict[str, str], recipe: Any) -> list[Cell]:
    """Every command of a study, each after those it needs.

    Args:
        study: checked.
        folder: of the study.
        data: name -> path, for the `{name}` of values.
        recipe: finds the YAML file of a recipe's name.
    Raises:
        ConfigError: an unknown recipe, or a `{name}` that the study's data do not have.
    """
    made: list[Cell] = []
    digests: dict[str, str] = {}
    rendered = [name for name in study.data if data.get(name) == str(folder / "data" / name)]
    made_of = {**data, **{name: json.dumps(study.data[name], sort_keys=True) for name in rendered}}

    def add(cell: Cell, **paths: str) -> None:
        """One more command; `paths` are fields that name what an earlier command makes."""
        values = {name: value for name, value in cell.values.items() if name not in ("run", "title")}
        facts = _filled({**values, **{name: digests.get(path, path) for name, path in paths.items()}}, made_of)
        recipe_text = cell.config.read_bytes().decode("utf-8", "surrogateescape") if cell.config else ""
        text = json.dumps([cell.command, recipe_text, facts], sort_keys=True, default=str)
        digests[cell.id] = hashlib.sha256(text.encode()).hexdigest()
        made.append(replace(cell, values=_filled(cell.values, data), digest=digests[cell.id]))

    for row in study.rows:
        config = recipe(row.recipe) if row.recipe else None
        for seed in study.row_seeds(row):
            own = f"pretrain/{_slug(row.name)}-s{seed}"
            encoder = row.encoder
            if config is not None:
                values = {**study.pretrain, **row.set, "run": str(folder / own), "seed": seed}
                add(Cell(own, row.name, seed, "pretrain", "", config, values))
                encoder = str(folder / own)
            like = {}
            if row.like:
                like_row = next(r for r in study.rows if r.name == row.like)
                like = {"like": str(folder / f"pretrain/{_slug(row.like)}-s{study.row_seeds(like_row)[0]}")}
            needs = own if config is not None else like.get("like", "").removeprefix(f"{folder}/")
            for evaluation in [e for e in study.evaluations if e.name in (row.evaluations or [e.name])]:
                name = f"{_slug(evaluation.name)}/{_slug(row.name)}-s{seed}"
                values = {
                    **study.evaluate,
                    **evaluation.set,
                    **row.evaluate,
                    **like,
                    "encoder": encoder,
                    "run": str(folder / name),
                    "title": row.name,
                    "seed": seed,
                }
                cell = Cell(name, row.name, seed, evaluation.command, evaluation.name, None, values, needs)
                add(cell, **{taken: needs for taken in (("like",) if like else ("encoder",)) if needs})
    return made


def _filled(values: dict[str, Any], data: dict[str, str]) -> dict[str, Any]:
    return {name: _with_data(value, data) for name, value in values.items()}


def _with_data(value: Any, data: dict[str, str]) -> Any:
    """`{name}` in texts replaced by the path of that name."""
    if isinstance(value, list):
        return [_with_data(item, data) for item in value]
    if not isinstance(value, str) or "{" not in value:
        return value
    try:
        return value.format_map(data)
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(f"{value!r} must name data of the study ({_names(data)}), got {error}") from error


def _names(data: Iterable[str]) -> str:
    return ", ".join(data) or "none"
