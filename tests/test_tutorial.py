"""docs/tutorial.md is run cell by cell, in its order, in an empty folder."""

import contextlib
import csv
import io
import re
import shlex
from pathlib import Path

import pytest

from rcmstr_fast.cli.main import main

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tutorial.md"
CELL = re.compile(r"^```(sh|python)\n(.*?)^```$", re.M | re.S)


def cells(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced cells that are meant to be run."""
    return CELL.findall(text)


def run_cell(language: str, content: str, names: dict) -> str:
    """What a cell prints. Commands run in this process: a dozen processes would mostly import torch."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if language == "python":
            exec(compile(content, str(PAGE), "exec"), names)
        for line in content.splitlines() if language == "sh" else ():
            program, *words = shlex.split(line)
            assert program == "rcmstr", f"only rcmstr is run here, got {line}"
            assert main(words) == 0, line
    return out.getvalue()


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RCMSTR_FAST_THREADS", "1")
    names: dict = {}
    said = [run_cell(language, content, names) for language, content in cells(PAGE.read_text(encoding="utf-8"))]
    with open("words.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"pictures/{i}.jpg" for i in range(8)]
    assert all(0 <= float(row["confidence"]) <= 1 for row in rows)
    assert names["frames"].shape[:2] == (1, 26) and names["lines"][-1]["step"] == 4
    for path in ("runs/first/views.png", "reader.md", "encoder.md", "report.html", "words/train/samples.png"):
        assert Path(path).is_file(), path
    assert any("accuracy" in text for text in said), "the table of the probe"


def test_a_broken_cell_would_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="pretrian"):
        run_cell("sh", "rcmstr pretrian --run x\n", {})
    with pytest.raises(ZeroDivisionError):
        run_cell("python", "1 / 0\n", {})
    assert cells("```sh\nrcmstr a\n```\n\n```text\nnot run\n```\n") == [("sh", "rcmstr a\n")]
