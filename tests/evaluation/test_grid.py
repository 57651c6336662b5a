"""Shares of the labels times seeds: resumed, reported with mean and deviation."""

import csv
import json
import statistics

import pytest

from rcmstr_fast.cli.arguments import _joined
from rcmstr_fast.cli.main import main
from rcmstr_fast.config import ConfigError, RunError
from rcmstr_fast.evaluation import grid
from rcmstr_fast.evaluation.fit import Fit
from rcmstr_fast.evaluation.metrics import Score
from rcmstr_fast.evaluation.report import RunResult, SetResult
from tests.evaluation.rendered import tiny_config


def test_a_killed_grid_goes_on_and_keeps_its_lists(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, steps=1, batch_size=4, normalise=True, lr=1e-2)
    whole, taken = Fit._update, []

    def third_dies(self, *arguments):
        if len(taken) == 2:
            raise RunError("killed")
        taken.append(self.config.run)
        whole(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(RunError):
        patch.setattr(Fit, "_update", third_dies)
        grid.run_grid(config, [0.2, 1.0], [0, 1])
    assert not (tmp_path / "run/table.md").exists()
    taken.append("")

    def counted(self, *arguments):
        taken.append(self.config.run)
        whole(self, *arguments)

    monkeypatch.setattr(Fit, "_update", counted)
    text = grid.run_grid(config, [0.2, 1.0], [0, 1])
    assert len(taken) == 2 + 1 + 2  # the first two cells are only read
    cells = json.loads((tmp_path / "run/grid.json").read_text())
    assert [(cell["subset"], cell["seed"]) for cell in cells] == [(0.2, 0), (0.2, 1), (1.0, 0), (1.0, 1)]
    lists = [
        json.loads((tmp_path / f"run/subset-{s}/seed-{n}/words.json").read_text()) for s in ("0.2", "1") for n in (0, 1)
    ]
    small, other, large, _ = [set(found["train"]["records"]) for found in lists]
    assert len(small) == 11 and small < large and small != other and len(large) == 54
    assert "| 20 %" in text and "| 11" in text and " +- " in text
    rows = list(csv.DictReader((tmp_path / "run/results.csv").open()))
    assert {row["set"] for row in rows} == {"digits", "mean"} and {row["seeds"] for row in rows} == {"2"}
    neds = [cell["sets"][0]["score"]["ned"] for cell in cells[:2]]
    row = next(row for row in rows if (row["subset"], row["metric"], row["set"]) == ("0.2", "ned", "digits"))
    assert float(row["mean"]) == pytest.approx(sum(neds) / 2, abs=1e-6)
    assert float(row["deviation"]) == pytest.approx(statistics.stdev(neds), abs=1e-6)
    with pytest.raises(ConfigError, match="holds a single run"):
        grid.run_grid(tiny_config(tmp_path, run=str(tmp_path / "run/subset-1/seed-0")), [1.0], [0])


def test_mean_and_deviation_of_a_table():
    def result(accuracy):
        score = Score(10, accuracy, 1.0, 1.0, 0.0, 0.0)
        return RunResult("m", [SetResult("A", "exact", 12, {"x": 2}, score)], {"train_words": 5})

    cells = [grid.Cell(0.01, seed, None) for seed in range(3)]
    line = grid.grid_table(cells, [result(x) for x in (0.1, 0.2, 0.6)]).splitlines()[2]
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "1 %",
        "5",
        "3",
        "exact",
        "30.00 +- 26.46",
        "30.00 +- 26.46",
    ]
    assert "A (N 10/12)" in grid.grid_table(cells[:1], [result(0.1)]) and grid.spread([0.5]) is None


@pytest.mark.parametrize(
    "subsets, seeds, message",
    [
        ([], [0], "subset must be different"),
        ([0.1, 0.1], [0], "subset must be"),
        ([0.1], [1, 1], "seeds must be"),
        ([0.1, 2.0], [0], "subset must be more than 0 and at most 1"),
    ],
)
def test_wrong_grids_are_refused_before_anything_runs(tmp_path, subsets, seeds, message):
    with pytest.raises(ConfigError, match=message):
        grid.run_grid(tiny_config(tmp_path), subsets, seeds)
    assert not (tmp_path / "run").exists()


def test_words_after_an_option_are_its_list():
    words = ["--run", "r", "--subset", "0.01", "0.1", "--seeds", "0", "1", "2", "--lr", "1e-3"]
    assert _joined(words, ("--subset", "--seeds"), ()) == [
        "--run",
        "r",
        "--subset",
        "[0.01,0.1]",
        "--seeds",
        "[0,1,2]",
        "--lr",
        "1e-3",
    ]
    assert _joined(["--subset", "0.1"], ("--subset",), ()) == ["--subset", "0.1"]


def test_the_command_line_of_a_grid(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(grid, "run_grid", lambda config, *given: seen.append((config, *given)) or "the table")
    words = ["finetune", "--train", "[a]", "--test", "[b]", "--encoder", "random"]
    assert main([*words, "--subset", "0.01", "0.1", "--seeds", "0", "1", "2"]) == 0
    assert main([*words, "--subset", "0.5", "--seeds", "7"]) == 0
    assert capsys.readouterr().out == "the table\n" * 2
    assert [given[1:] for given in seen] == [([0.01, 0.1], [0, 1, 2]), ([0.5], [7])]
    assert seen[0][0].mode == "finetune"
