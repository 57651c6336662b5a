"""`rcmstr read` and `rcmstr export` as a user types them."""

import csv
import io
import json

import pytest

from rcmstr_fast.cli.main import main
from rcmstr_fast.data.source import open_sources
from tests.evaluation.rendered import picture, write_words
from tests.exchange.tiny import CNN, write_recogniser


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("read")
    write_recogniser(root / "recogniser.safetensors", **CNN)
    (root / "pictures").mkdir()
    for i in range(5):
        (root / "pictures" / f"{i}.png").write_bytes(picture(str(i)))
    (root / "pictures" / "broken.png").write_bytes(b"no picture")
    (root / "words.txt").write_text("12\n7\n")
    return root


def read(place, *more):
    return main(["read", "--recogniser", str(place), "--device", "cpu", "--batch_size", "2", *more])


def test_a_folder_to_csv_and_jsonl(place, capsys):
    out = place / "words.csv"
    assert read(place, str(place / "pictures"), "--out", str(out), "--lexicon", str(place / "words.txt")) == 1
    captured = capsys.readouterr()
    assert "broken.png: not a picture" in captured.err and "6 words in" in captured.err and captured.out == ""
    rows = list(csv.DictReader(out.open(newline="")))
    assert [row["file"][-5:] for row in rows] == [f"{i}.png" for i in range(5)]
    assert {row["text"] for row in rows} <= {"12", "7"} and all(int(row["distance"]) >= 0 for row in rows)
    assert read(place, str(place / "pictures" / "*.png"), "--format", "jsonl", "--charset", "36") == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == [row["read"] for row in rows]
    assert all(len(line["characters"]) == len(line["text"]) for line in lines)


def test_names_on_standard_input_to_labels_that_convert_takes(place, capsys, monkeypatch, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(str(i)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("0.png\n1.png\n2.png\n"))
    assert read(place, "-", "--out", "labels.tsv") == 0
    capsys.readouterr()
    assert main(["data", "convert", str(tmp_path), str(tmp_path / "lmdb")]) == 0
    labels = open_sources([tmp_path / "lmdb"]).labels(range(3))
    lines = [line.split("\t") for line in (tmp_path / "labels.tsv").read_text().splitlines()]
    assert [label or "" for label in labels] == [text for _, text in lines]


def test_an_lmdb_with_calibrated_confidences(place, capsys, tmp_path):
    words = write_words(tmp_path / "lmdb", [str(i) for i in range(12)])
    assert read(place, words, "--calibrate", words, "--precision", "fp32") == 0
    captured = capsys.readouterr()
    assert "temperature" in captured.err and captured.out.splitlines()[0].startswith(
        f"{words}/data.mdb:image-000000001\t"
    )


def test_export_writes_a_card(place, capsys, tmp_path):
    words = write_words(tmp_path / "lmdb", [str(i) for i in range(12)])
    out = tmp_path / "made.safetensors"
    arguments = ["export", str(place), "--format", "safetensors", "--out", str(out), "--calibrate", words]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{out}\n{tmp_path / 'made.md'}\n"
    assert "Confidences are calibrated: temperature" in (tmp_path / "made.md").read_text()
    assert main(["export", str(place), "--format", "timm", "--out", str(tmp_path / "x.pth")]) == 2
    assert "--part encoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch_size", "0"], "batch_size must be at least 1"),
        (["--out", "words.xyz"], "out must end in"),
        (["--charset", "95"], "charset must be 36, 62, 94 or a file"),
        (["--lexicon", "absent.txt"], "does not exist"),
        (["--calibrate", "val"], "words.json"),
        (["--formta", "csv"], "did you mean format"),
    ],
)
def test_mistakes_are_one_line(place, more, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read(place, str(place / "pictures"), *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_empty_line_in_the_lexicon_is_named(place, capsys):
    (place / "gap.txt").write_text("a\n\nb\n")
    assert read(place, str(place / "pictures"), "--lexicon", str(place / "gap.txt")) == 2
    assert "line 2 is empty" in capsys.readouterr().err
