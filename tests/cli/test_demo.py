import dataclasses
import os
from pathlib import Path

import pytest

from rcmstr_fast.cli import demo
from rcmstr_fast.cli.main import main
from rcmstr_fast.config import RunError
from rcmstr_fast.data.source import open_sources
from rcmstr_fast.evaluation import probe as probing

TINY = demo.Size(
    48,
    60,
    16,
    {"texts": "words", "num_words": 2000},
    {"width": 0.125, "image_width": 44, "projector_hidden": 16},
    {"name": "rcmstr", "queue_size": 64, "momentum": 0.9},
    {"lr": 1e-3},
    2,
    8,
    2,
    8,
    1e-3,
    16,
    8,
    1e-3,
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "LAPTOP", TINY)
    monkeypatch.setenv("RCMSTR_FAST_THREADS", "1")


@pytest.mark.parametrize("at_once", [False, True])
def test_the_whole_way_and_again(small, tmp_path, capsys, monkeypatch, at_once):
    run = tmp_path / "demo"
    if at_once:
        monkeypatch.setattr(demo, "LAPTOP", dataclasses.replace(TINY, small=True))
        monkeypatch.setenv("RCMSTR_FAST_THREADS", "2")
    assert main(["demo", "--run", str(run), "--size", "laptop"]) == 0
    first = capsys.readouterr().out
    for title in ("pretrained encoder, frozen", "untrained encoder, frozen", "same network, all trained from scratch"):
        assert title in first
    assert "held_out (N " in first and str(run) in first
    assert (run / "table.md").read_text() in first
    pictures = [line.strip() for line in first.splitlines() if line.strip().endswith(".png")]
    assert len(pictures) == 3 and all((tmp_path / p).is_file() for p in pictures)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert (
        str(run / "report.html") in first and "steps of 8 words" in page and "<svg" in page and "data:image/png" in page
    )
    assert (run / "learning.svg").read_text(encoding="utf-8").startswith("<svg")
    sets = [
        set(open_sources([str(run / "words" / name)]).labels(range(n)))
        for name, n in (("held_out", 16), ("labelled", 60))
    ]
    assert sets[0] and sets[1] and not sets[0] & sets[1]
    before, took = (run / "pretrain" / "metrics.jsonl").read_text(), (run / "times.json").read_text()
    assert main(["demo", "--run", str(run), "--size", "laptop"]) == 0
    assert (run / "table.md").read_text() in capsys.readouterr().out
    assert (run / "pretrain" / "metrics.jsonl").read_text() == before and (run / "times.json").read_text() == took


def test_from_scratch_gets_the_time_of_pretraining_and_decoder(tmp_path, monkeypatch):
    def timed(folder, speed):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(f'{{"step": 5, "images_per_s": {speed}}}\n')

    monkeypatch.setattr(demo, "_pretrain", lambda folder, crops, size: timed(folder, 4.0))
    monkeypatch.setattr(probing, "probe", lambda config: timed(Path(config.run), 64.0))
    clock = demo.Clock(tmp_path / "times.json")
    clock.seconds = {"untrained": 6.0}
    size = dataclasses.replace(TINY, scratch_batch=32, pretrain_steps=2, pretrain_batch=8)
    found = [demo._scratch_steps(tmp_path / "timing", clock, "crops", tmp_path, size) for _ in range(2)]
    assert found == [20, 20]  # 4 s of pretraining and 6 s of a decoder, x 64 words/s of 32 words a step


@pytest.mark.parametrize("at_once", [False, True])
def test_work_beside_is_done_once_and_timed(tmp_path, at_once):
    for _ in range(2):
        clock = demo.Clock(tmp_path / "t.json")
        with demo.beside(clock, "work", os.mkdir, str(tmp_path / "made"), at_once=at_once):
            pass
    assert (tmp_path / "made").is_dir() and clock.seconds["work ended"] == 1.0
    with pytest.raises((RunError, OSError)), demo.beside(clock, "again", os.mkdir, str(tmp_path), at_once=at_once):
        pass
    assert not clock.seconds["again ended"]


def test_the_clock_counts_interrupted_parts_and_stops_at_the_end(tmp_path, monkeypatch):
    now = iter([0.0, 3.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr(demo.time, "monotonic", lambda: next(now))
    with pytest.raises(KeyboardInterrupt), demo.Clock(tmp_path / "t.json").running("a"):
        raise KeyboardInterrupt
    for _ in range(2):
        with demo.Clock(tmp_path / "t.json").running("a"):
            pass
    assert demo.Clock(tmp_path / "t.json").seconds["a"] == 5.0


@pytest.mark.parametrize(("count", "says"), [(200, "but no labels"), (24, "too few labelled words")])
def test_own_data_is_pretrained_on_and_tested(small, tmp_path, capsys, count, says):
    own = tmp_path / "own"
    assert main(["data", "synth", "--out", str(own), "--count", str(count), "--seed", "9", "--processes", "1"]) == 0
    capsys.readouterr()
    for _ in range(2):
        assert main(["demo", "--run", str(tmp_path / "demo"), "--size", "laptop", "--data", str(own)]) == 0
        out = capsys.readouterr().out
        assert "held_out (N " in out and says in out
    words = tmp_path / "demo" / "words"
    assert not (words / "unlabelled").exists()
    if count == 200:
        texts = [
            set(filter(None, open_sources([str(words / name)]).labels(range(10)))) for name in ("labelled", "held_out")
        ]
        assert texts[0] and texts[1] and not texts[0] & texts[1]


def test_missing_data_is_one_line(small, tmp_path, capsys):
    assert main(["demo", "--run", str(tmp_path / "demo"), "--size", "laptop", "--data", str(tmp_path / "none")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("rcmstr demo: ") and "does not exist" in last
