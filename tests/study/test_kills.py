"""Miniature studies, killed at random moments and run again: each ends whole, and no command that had ended is repeated.

`python -m tests.study.test_kills [NAME ...]` is the long form: every miniature, or those that are named.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from rcmstr_fast.data.convert import convert
from rcmstr_fast.evaluation.protocols import get_protocol
from rcmstr_fast.recipe_files import FOLDER, find, names
from rcmstr_fast.study.plan import Cell, Study, cells, read_study
from rcmstr_fast.study.records import Json, study_record
from rcmstr_fast.study.run import data_paths
from rcmstr_fast.study.tables import UNFINISHED, tables

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data"
TINY = [name for name in names("studies") if name.startswith("tiny_")]
#: Name of data that a study is given -> archive of real pictures, and which of them it takes.
GIVEN = {
    "chinese": ("chinese_plates_train", slice(0, 200)),
    "chinese_test": ("chinese_plates_train", slice(200, 240)),
    "handwriting": ("handwriting_train", slice(0, 200)),
    "handwriting_test": ("handwriting_train", slice(200, 240)),
    "pairs": ("seg_dibco_train", slice(0, 48)),
    "pairs_test": ("seg_dibco_train", slice(48, 64)),
    "words": ("iiit5k_train", slice(0, 200)),
    "iiit5k": ("iiit5k_test", slice(0, 40)),
}
#: So short that a command takes about as long as its imports, and yet saves several times.
PRETRAIN = {"train.steps": 6, "train.save_every": 2, "train.global_batch_size": 8, "train.trackers": []}
EVALUATE = {"steps": 6, "eval_every": 2, "batch_size": 8}
COUNTS = {"crops": 64, "labelled": 200, "held_out": 24, "validation": 24, "rendered": 64}


def shortened(name: str, folder: Path) -> Path:
    """A study file with all rows and evaluations of a miniature, one seed, few words, and commands of a few steps."""
    study = read_study(find(name, "studies"))
    for path in (FOLDER / "studies").glob("tiny_*.yaml"):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    fields = {
        "base": name,
        "seeds": [0],
        "rows": [asdict(replace(row, seeds=[])) for row in study.rows],
        "pretrain": study.pretrain | PRETRAIN,
        "evaluate": study.evaluate | EVALUATE,
        "evaluations": [asdict(replace(e, set={**e.set, **EVALUATE})) for e in study.evaluations],
        "data": {k: {**v, "count": COUNTS[k]} if isinstance(v, dict) else v for k, v in study.data.items()},
    }
    path = folder / f"short_{name.removeprefix('tiny_')}.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def given(study: Study, folder: Path) -> dict[str, str]:
    """Paths of the data that a study must be given, made of real pictures; skips where there are none."""
    wanted = [name for name, source in study.data.items() if not source]
    if wanted and not REAL.exists():
        pytest.skip("real pictures (../shared/data) are not at hand")
    return {name: str(made(name, folder / name)) for name in wanted}


def made(name: str, out: Path) -> Path:
    """Some pictures of an archive with their labels or masks, or the characters of all its labels."""
    if name == "chinese_charset":
        with zipfile.ZipFile(REAL / "chinese_plates_train.zip") as archive:
            labels = [line.split("\t")[1] for line in archive.read("labels.tsv").decode().splitlines()]
        characters = set(get_protocol("bctr").normalise("".join(labels)))  # as the study's protocol writes them
        out.write_text("".join(sorted(characters)), encoding="utf-8")
        return out
    source, part = GIVEN[name]
    with zipfile.ZipFile(REAL / f"{source}.zip") as archive:
        listed = "pairs.tsv" if "pairs.tsv" in archive.namelist() else "labels.tsv"
        lines = archive.read(listed).decode().splitlines()[part]
        masks = listed == "pairs.tsv"
        folder = out if masks else out.with_name(f"{out.name}_pictures")
        for line in lines:
            for member in line.split("\t")[: 1 + masks]:
                archive.extract(member, folder)
    (folder / listed).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not masks:
        convert(folder, out)
    return out


class Runner:
    """`rcmstr study` on a study file, started as often as it takes.

    Args:
        name: of the miniature.
        folder: empty; for all files.
        seed: of the moments at which it is killed.
    """

    def __init__(self, name: str, folder: Path, seed: int = 0) -> None:
        self.path, self.out, self.drawn = shortened(name, folder), folder / "out", random.Random(f"{name} {seed}")
        self.study = read_study(self.path)
        self.data = given(self.study, folder)
        self.planned: list[Cell] = cells(self.study, self.out, data_paths(self.study, self.out, self.data), find)
        self.starts = 0

    def recorded(self) -> dict[str, str]:
        """id -> record, of the commands that have ended well."""
        folder = self.out / "cells"
        found = {c.id: folder / f"{c.id}.json" for c in self.planned}
        return {cell: path.read_text() for cell, path in found.items() if path.is_file()}

    def start(self) -> subprocess.Popen:
        """The runner in a process group of its own; what it says goes to a file."""
        words = ["study", str(self.path), "--out", str(self.out), "--jobs", "2"]
        words += [f"--data.{name}={path}" for name, path in self.data.items()]
        self.starts += 1
        with open(self.out.with_name(f"said-{self.starts}.txt"), "wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "rcmstr_fast.cli.main", *words],
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def said(self) -> str:
        """What the runner has said since it was started last."""
        return self.out.with_name(f"said-{self.starts}.txt").read_text(encoding="utf-8")

    def begun(self) -> list[str]:
        """ids of the commands that it has begun since."""
        return [line.split(" ", 1)[1].split(": begun")[0] for line in self.said().splitlines() if ": begun" in line]

    def kill(self, after: int, *, alone: bool) -> str:
        """Start it, and kill it at a random moment of the commands that follow so many ended ones.

        Args:
            after: ended commands.
            alone: only the runner is killed and its commands outlive it, until they notice; otherwise all are.
        Returns:
            When it was killed; empty where it came to its end before.
        """
        began, before, process = time.monotonic(), self.recorded(), self.start()
        while process.poll() is None and not self.begun():
            time.sleep(0.02)
        imports = time.monotonic() - began  # which is a good part of what a command takes
        while process.poll() is None and len(self.recorded()) < after:
            time.sleep(0.02)
        time.sleep(self.drawn.uniform(0.0, 2 * imports))
        if process.poll() is not None:
            assert process.returncode == 0, self.said()
            return ""
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()
        self.check_begun(before)
        return f"after {len(self.recorded())} of {len(self.planned)}{' (alone)' if alone else ''}"

    def check_begun(self, before: dict[str, str]) -> None:
        """What had ended before is as it was, and nothing of it has been begun again, nor anything twice."""
        begun = self.begun()
        assert len(begun) == len(set(begun)) and not set(begun) & set(before), (begun, list(before))
        after = self.recorded()
        assert {cell: after.get(cell) for cell in before} == before

    def finish(self) -> Json:
        """Run it to its end; the record of the study."""
        before, process = self.recorded(), self.start()
        assert process.wait(timeout=3600) == 0, self.said()
        self.check_begun(before)
        assert set(self.begun()) | set(before) == set(self.recorded()) == {cell.id for cell in self.planned}
        return study_record(self.study, self.out, self.planned)

    def check_report(self, record: Json) -> None:
        """No result is missing, and every table shows every row of its evaluation."""
        assert record["commands"] == record["done"] == len(self.planned)
        results = [r for row in record["rows"] for by_seed in row["results"].values() for r in by_seed.values()]
        assert len(results) == sum(bool(cell.evaluation) for cell in self.planned) and all(results)
        pages = {ending: self.out / f"report.{ending}" for ending in ("html", "md", "csv", "tex")}
        texts = {ending: path.read_text(encoding="utf-8") for ending, path in pages.items()}
        assert all(UNFINISHED not in text for text in texts.values())
        shown = tables(record)
        assert {table.title.split(":")[0] for table in shown} == {e.name for e in self.study.evaluations}
        for table in shown:
            evaluation = table.title.split(":")[0]
            rows = [row[0] for row, quoted in zip(table.rows, table.quoted) if not quoted]
            assert rows == [cell.row for cell in self.planned if cell.evaluation == evaluation], table.title
            assert table.to_markdown() in texts["md"] and table.to_csv() in texts["csv"]
            assert table.to_latex() in texts["tex"] and texts["html"].count(f"<h3>{table.title}</h3>") == 1


def killed_and_finished(name: str, folder: Path, kills: int) -> str:
    """Kill a miniature so often, and run it to its end; what happened, in one line."""
    began, runner = time.monotonic(), Runner(name, folder)
    moments = sorted(runner.drawn.choices(range(len(runner.planned)), k=kills))
    told = [runner.kill(after, alone=i % 2 == 1) for i, after in enumerate(moments)]
    runner.check_report(runner.finish())
    assert json.loads(next(iter(runner.recorded().values())))["seconds"] > 0
    return (
        f"{name}: {len(runner.planned)} commands, killed {', '.join(filter(None, told))}; whole after "
        f"{time.monotonic() - began:.0f} s"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_seqclr_table3", "tiny_table5"])
def test_a_miniature_is_whole_after_a_kill(name, tmp_path):
    killed_and_finished(name, tmp_path, kills=1)


def main(chosen: list[str]) -> None:
    """The long form."""
    for name in chosen or TINY:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(killed_and_finished(name, Path(folder), kills=2), flush=True)
            except pytest.skip.Exception as reason:
                print(f"{name}: skipped, {reason}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
