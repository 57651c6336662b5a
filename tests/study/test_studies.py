"""Every study that comes with the package plans, and its commands are ones that the command line understands."""

import importlib
from pathlib import Path

import pytest

from rcmstr_fast import recipe_files
from rcmstr_fast.cli.arguments import Parser, to_dataclass, to_pretraining
from rcmstr_fast.cli.main import main
from rcmstr_fast.config import ConfigError, resolve
from rcmstr_fast.evaluation import config as evaluation
from rcmstr_fast.evaluation import published
from rcmstr_fast.study.plan import Cell, cells, read_study
from rcmstr_fast.study.words import render_set

#: Fields that only say where a command works.
_PLACES = ("run", "title", "seed", "encoder", "like")


def planned(name: str) -> list[Cell]:
    """The commands of a study whose data are all somewhere."""
    study = read_study(recipe_files.find(name, "studies"))
    return cells(study, Path("out"), dict.fromkeys(study.data, "somewhere"), recipe_files.find)


def different(found: list[Cell]) -> list[Cell]:
    """One command of each kind: seeds and places left out."""
    kinds = {}
    for cell in found:
        values = {name: value for name, value in cell.values.items() if name not in _PLACES}
        kinds.setdefault((cell.command, cell.config, str(sorted(values.items(), key=str))), cell)
    return list(kinds.values())


def understood(cell: Cell) -> None:
    """Parse and check a command as far as that goes without data."""
    command, *words = cell.arguments()
    parser = Parser(prog=f"rcmstr {command}")
    parser.given = words
    importlib.import_module(f"rcmstr_fast.cli.{command}").add_arguments(parser)
    arguments = parser.instantiate(parser.parse_args(words))
    if command == "pretrain":
        resolve(to_pretraining(arguments))
    elif command == "segment":
        evaluation.check_segment(to_dataclass(evaluation.SegmentConfig, arguments))
    else:
        evaluation.check(to_dataclass(evaluation.ProbeConfig, arguments))


@pytest.mark.parametrize("name", recipe_files.names("studies"))
def test_every_command_is_understood(name):
    for cell in different(planned(name)):
        try:
            understood(cell)
        except ConfigError as error:
            pytest.fail(f"{cell.id}: {error}")


@pytest.mark.parametrize("name", recipe_files.names("studies"))
def test_published_rows_and_data_exist(name):
    study = read_study(recipe_files.find(name, "studies"))
    for row in study.rows:
        if row.published and study.table:
            keys = [found.key for found in published.table(study.table).rows]
            assert row.published in keys, f"{row.name}: {row.published} is none of {keys}"
    used = str(
        [cell.values for cell in cells(study, Path("out"), {k: f"<{k}>" for k in study.data}, recipe_files.find)]
    )
    assert [data for data in study.data if f"<{data}>" not in used] == []


def test_each_study_has_a_tiny_form():
    names = recipe_files.names("studies")
    assert [name for name in names if not name.startswith("tiny_") and f"tiny_{name}" not in names] == []


def test_tiny_sets_can_be_rendered(tmp_path):
    study = read_study(recipe_files.find("tiny_table1_cnn", "studies"))
    for name, fields in study.data.items():
        render_set({**fields, "count": 3}, tmp_path / name)
        assert (tmp_path / name / "data.mdb").is_file()


def test_a_plan_of_some_rows_has_their_commands_alone(tmp_path, capsys):
    plan = ["study", "tiny_trials_vit", "--plan", "true", "--out", str(tmp_path / "out"), "--only"]
    assert main([*plan, "PerSec, strokes only"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in commands] == ["pretrain", "probe"]
    assert "--method.semantic_weight=0.0" in commands[0]
    assert main([*plan, "nope"]) == 2
    assert "only must name rows of the study ('untrained', 'PerSec, rate 0.001', " in capsys.readouterr().err
