import pytest

from rcmstr_fast.cli import demo
from rcmstr_fast.cli.main import main
from rcmstr_fast.data.source import open_sources

TINY = demo.Size(48, 60, 16, 0.25, 64, 2, 8, 0.9, 1e-3, 2, 2, 8, 1e-3, 16, 25, False)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "LAPTOP", TINY)
    monkeypatch.setenv("RCMSTR_FAST_THREADS", "1")


def test_the_whole_way_and_again(small, tmp_path, capsys):
    run = tmp_path / "demo"
    assert main(["demo", "--run", str(run), "--size", "laptop"]) == 0
    first = capsys.readouterr().out
    for title in ("pretrained encoder, frozen", "untrained encoder, frozen", "same network, all trained from scratch"):
        assert title in first
    assert "held_out (N " in first and str(run) in first
    assert (run / "table.md").read_text() in first
    pictures = [line.strip() for line in first.splitlines() if line.strip().endswith(".png")]
    assert len(pictures) == 3 and all((tmp_path / p).is_file() for p in pictures)
    held_out, training = ((run / "words" / name).read_text().split("\n") for name in ("held_out.txt", "training.txt"))
    assert not set(held_out) & set(training)
    before = (run / "pretrain" / "metrics.jsonl").read_text()
    assert main(["demo", "--run", str(run), "--size", "laptop"]) == 0
    assert (run / "table.md").read_text() in capsys.readouterr().out
    assert (run / "pretrain" / "metrics.jsonl").read_text() == before


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
