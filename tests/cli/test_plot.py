"""`rcmstr plot`: each figure is drawn from what it says, as SVG and PNG."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from rcmstr_fast.cli.main import main
from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.source import open_sources
from rcmstr_fast.exchange.reading import Reader
from rcmstr_fast.plots import characters, figures
from tests.evaluation.rendered import picture
from tests.exchange.tiny import CNN, write_recogniser


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with a recogniser of random weights and a few pictures."""
    root = tmp_path_factory.mktemp("plot")
    write_recogniser(root / "recogniser.safetensors", **CNN)
    (root / "words").mkdir()
    for i in range(6):
        (root / f"words/{i}.png").write_bytes(picture(str(10 + i)))
    return root


def drawn(capsys, stem):
    """What the command printed are the two files, and the PNG is a picture that is not blank."""
    assert capsys.readouterr().out.split() == [f"{stem}.svg", f"{stem}.png"]
    pixels = np.asarray(Image.open(f"{stem}.png").convert("L"))
    assert pixels.std() > 5
    return (stem.parent / f"{stem.name}.svg").read_text()


def test_curves(tmp_path, capsys):
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        lines = [{"step": i, "loss": value / i, **({"probe_accuracy": 0.1} if name == "b" else {})} for i in (1, 2, 3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = [str(tmp_path / name) for name in "ab"]
    assert main(["plot", "curves", *runs, "--out", str(tmp_path / "c.svg")]) == 0
    svg = drawn(capsys, tmp_path / "c")
    assert ">a<" in svg and ">b<" in svg and "online probe, accuracy" in svg
    assert main(["plot", "curves", *runs, "--metrics", "nothing", "--out", str(tmp_path / "d")]) == 2
    assert "metric nothing is in none of" in capsys.readouterr().err
    assert main(["plot", "curves", str(tmp_path), "--out", str(tmp_path / "d")]) == 2
    assert main(["plot", "curves", *runs, "--out", str(tmp_path / "no/d")]) == 2


def test_attention_and_masks(made, tmp_path, capsys):
    image = str(made / "words/0.png")
    assert main(["plot", "attention", image, "--recogniser", str(made), "--out", str(tmp_path / "a")]) == 0
    assert "share of the character" in drawn(capsys, tmp_path / "a")
    assert main(["plot", "masks", image, "--draws", "2", "--out", str(tmp_path / "m")]) == 0
    assert "epoch 1" in drawn(capsys, tmp_path / "m")
    for more, message in (
        (["--mask_ratio", "2"], "mask_ratio must be at least 0 and at most 1, got 2.0"),
        (["--run", str(made)], "with masks"),
    ):
        assert main(["plot", "masks", image, *more, "--out", str(tmp_path / "n")]) == 2
        assert message in capsys.readouterr().err


def test_tsne(made, tmp_path, capsys):
    words = str(made / "words")
    assert main(["plot", "tsne", words, "--recogniser", str(made), "--misread", "--out", str(tmp_path / "t")]) == 0
    assert "character (frames)" in drawn(capsys, tmp_path / "t")
    rows = [line.split("\t") for line in (tmp_path / "t.tsv").read_text().splitlines()]
    network, _ = figures.load_recogniser(made)
    found = characters.character_frames(network, open_sources([words]), misread=True)
    assert [row[1] for row in rows[1:]] == found.characters and len(found.features) == len(found.characters) >= 5


def test_the_title_counts_misread_words(made, tmp_path, capsys):
    """Of six words two are labelled as they are read: four are misread, left out or shown as ordered."""
    network, _ = figures.load_recogniser(made)
    files = sorted((made / "words").iterdir())
    read = Reader(network).read(files)
    assert all(reading.text for reading in read)
    for i, (file, reading) in enumerate(zip(files, read)):
        (tmp_path / "set" / file.name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / file.name).write_bytes(file.read_bytes())
        with open(tmp_path / "set/labels.tsv", "a") as lines:
            lines.write(f"{file.name}\t{reading.text if i < 2 else 'other'}\n")
    for more, said in (([], "of 2 words (4 misread left out)"), (["--misread"], "of 6 words (4 misread among them)")):
        command = [
            "plot",
            "tsne",
            str(tmp_path / "set"),
            "--recogniser",
            str(made),
            "--out",
            str(tmp_path / "t"),
            *more,
        ]
        assert main(command) == 0
        assert said in drawn(capsys, tmp_path / "t")


def test_frames_belong_to_the_character_that_looks_at_them():
    attention = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.1, 0.5, 0.4], [0.0, 0.0, 0.0, 0.0]])
    ids = torch.tensor([3, 4, 0])
    assert list(characters._held(ids, attention, "ab", 1)) == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]


def test_misread_words_are_left_out(made):
    network, _ = figures.load_recogniser(made)
    source = open_sources([str(made / "words")])
    source.labels = lambda records: ["never"] * len(records)
    with pytest.raises(ConfigError, match=r"found 0 \(6 misread, 0 read as nothing, 0 broken\)"):
        characters.character_frames(network, source)
