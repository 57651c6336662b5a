"""Kills at random moments, and at every point of a save, also under torchrun: the run ends as the uninterrupted one.

`python -m tests.train.test_kills [TIMES]` is the long form: so many kills at random moments (default 30), and so many
points of saves, each in one process and under torchrun.
"""

import re
import sys
import tempfile
from pathlib import Path

import pytest

from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.runfolder import RunFolder
from tests.train.compare import assert_same_run
from tests.train.dying import POINTS
from tests.train.launch import kill_at_random_moments, launch, start, torchrun
from tests.train.toy import toy_run

TOY, DYING = "tests.train.toy", "tests.train.dying"
FIELDS = {"train__save_every": 1, "train__log_every": 1}


def words(**fields) -> list[str]:
    return [f"{name}={value}" for name, value in (FIELDS | fields).items()]


def died(run: Path) -> list[str]:
    return Path(f"{run}.died").read_text().splitlines()


def assert_sound(run: Path) -> None:
    """Nothing half-written is taken for a file of the run."""
    folder = RunFolder(run)
    checkpoint.load(folder.last)
    checkpoint.load(folder.best)
    assert not list(folder.path.rglob("*.tmp")) and folder.encoder.stat().st_size > 0


def at_every_point(folder: Path, points: list[str], **fields) -> None:
    """One run that is killed at each of the points in turn."""
    whole, run = toy_run(folder / "whole", **FIELDS, **fields), folder / "run"
    for point in points:
        status, text = start(DYING, str(run), f"die={','.join(points)}", *words(**fields)).wait()
        assert status == -9, (point, status, text)
    assert start(DYING, str(run), *words(**fields)).wait()[0] == 0
    assert died(run) == points
    assert_same_run(run, whole)
    assert_sound(run)


def at_random(folder: Path, times: int, **fields) -> set[str]:
    """One run that is killed at random moments; the steps at which it began."""
    whole, run = toy_run(folder / "whole", **FIELDS, **fields), folder / "run"
    reached = kill_at_random_moments(TOY, run, "sleep=0.02", *words(**fields), within=0.2, times=times)
    assert start(TOY, str(run), *words(**fields)).wait()[0] == 0
    assert_same_run(run, whole)
    assert_sound(run)
    return reached


def under_torchrun(folder: Path, points: list[str], **fields) -> None:
    """One run of two processes, one of which is killed at each of the points; torchrun starts both again."""
    whole, run = folder / "whole", folder / "run"
    done = launch(TOY, str(whole), *words(**fields))
    assert [status for status, _ in done] == [0, 0], done
    ended = torchrun(DYING, str(run), f"die={','.join(points)}", *words(**fields), restarts=len(points))
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert died(run) == points
    assert_same_run(run, whole)
    assert_sound(run)


def test_killed_at_every_point_of_a_save(tmp_path):
    at_every_point(tmp_path, POINTS, train__steps=2 * len(POINTS) + 4)


def test_killed_at_random_moments(tmp_path):
    assert len(at_random(tmp_path, 8, train__steps=40)) > 3


@pytest.mark.slow
def test_killed_under_torchrun(tmp_path):
    under_torchrun(tmp_path, ["within:best.pt", "before:last.pt", "within:encoder.safetensors"], train__steps=10)


def main(times: int = 30) -> None:
    """The long form."""
    again = [point for point in POINTS if "best.pt" not in point]  # which is written while the loss still falls
    points = (POINTS + again * times)[:times]
    for what, how in (
        ("at points of saves", lambda folder: at_every_point(folder, points, train__steps=2 * times + 8)),
        ("at random moments", lambda folder: at_random(folder, times, train__steps=8 * times)),
        (
            "at points of saves under torchrun",
            lambda folder: under_torchrun(folder, points, train__steps=2 * times + 8),
        ),
    ):
        with tempfile.TemporaryDirectory() as folder:
            reached = how(Path(folder))
        print(f"{times} kills {what}: the run is the uninterrupted one" + (f"; began at {reached}" if reached else ""))


if __name__ == "__main__":
    main(*[int(word) for word in sys.argv[1:] if re.fullmatch(r"\d+", word)])
