"""Features in files: the encoder's own, in every format, batch by batch."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from rcmstr_fast.cli.main import main
from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.decode import decode_image
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.exchange.embed import embed
from rcmstr_fast.exchange.feature_files import texts_of
from rcmstr_fast.train.exported import load_encoder
from tests.evaluation.rendered import picture
from tests.evaluation.test_probe import export

WORDS = ["12", "", "7", "903", "5"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with an encoder, an LMDB of five words (the second without a label), and a broken picture."""
    root = tmp_path_factory.mktemp("embed")
    export(root / "encoder.safetensors")
    write_lmdb(root / "words", ((picture(word or "?"), word or None) for word in WORDS))
    (root / "loose.png").write_bytes(picture("44"))
    (root / "broken.png").write_bytes(b"no picture")
    return root


@pytest.fixture(scope="module")
def expected(made):
    """Frames [5, T, C] of the words in one batch, computed here."""
    encoder, _, header = load_encoder(made)
    height, width = header["height"], header["image_width"]
    pixels = [decode_image(picture(w or "?"), height, width, max_pixels=10**7, min_side=1) for w in WORDS]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return encoder(images).numpy()


@pytest.mark.parametrize("ending", ["safetensors", "npz", "parquet"])
def test_every_format_holds_the_encoders_features(made, expected, tmp_path, ending):
    out = tmp_path / f"f.{ending}"
    done = embed([str(made / "words")], made, out, levels=["word", "subword", "frame"], batch_size=2, device="cpu")
    assert done.written == 5 and not done.broken and list(tmp_path.iterdir()) == [out]
    if ending == "parquet":
        import pyarrow.parquet as parquet

        table = parquet.read_table(out)
        shapes = json.loads(table.schema.metadata[b"rcmstr_fast"])["shapes"]
        held = {n: np.array(table[n].to_pylist(), np.float32).reshape(5, *shapes[n]) for n in shapes}
        names, labels = table["name"].to_pylist(), table["label"].to_pylist()
    elif ending == "npz":
        held = dict(np.load(out))
        names = held["names"].tolist()
        labels = [x if there else None for x, there in zip(held["labels"].tolist(), held["labelled"])]
        assert json.loads(str(held["facts"]))["levels"] == ["word", "subword", "frame"]
    else:
        held = load_file(out)
        names = texts_of(held["names"].tobytes(), held["names_length"])
        texts = texts_of(held["labels"].tobytes(), held["labels_length"])
        labels = [x if there else None for x, there in zip(texts, held["labelled"])]
        with safe_open(str(out), "np") as file:
            assert json.loads(file.metadata()["rcmstr_fast"])["arch"] == "resnet29"
    assert labels == ["12", None, "7", "903", "5"]
    assert [name.rpartition("-")[2] for name in names] == [f"{i:09d}" for i in range(1, 6)]
    np.testing.assert_allclose(held["frame"], expected, atol=2e-4)
    np.testing.assert_allclose(held["word"], held["frame"].mean(1), atol=1e-5)
    assert held["subword"].shape == (5, 4, expected.shape[2])


def test_half_precision_and_tokens(made, expected, tmp_path):
    embed([str(made / "loose.png")], made, tmp_path / "f.npz", levels=["token"], dtype="float16", device="cpu")
    held = np.load(tmp_path / "f.npz")
    assert held["token"].dtype == np.float16 and held["token"].shape == (1, *expected.shape[1:])
    assert held["labelled"].tolist() == [False]


def test_broken_pictures_are_named_and_left_out(made, tmp_path, capsys):
    out = tmp_path / "f.npz"
    images = [str(made / "broken.png"), str(made / "loose.png")]
    assert main(["embed", *images, "--encoder", str(made), "--out", str(out), "--device", "cpu"]) == 1
    shown = capsys.readouterr().err
    assert "broken.png: not a picture" in shown and "1 pictures in" in shown
    assert np.load(out)["names"].tolist() == [str(made / "loose.png")]


def test_wrong_input_leaves_nothing(made, tmp_path):
    for changes, message in (
        ({"out": tmp_path / "f.csv"}, "out must end with"),
        ({"out": tmp_path / "no/f.npz"}, "does not exist"),
        ({"levels": ["sentence"]}, "levels must be"),
        ({"num_subwords": 99}, "num_subwords must be 1 to 9"),
        ({"images": [str(made / "broken.png")]}, "no picture could be read, such as"),
    ):
        fields = {"images": [str(made / "loose.png")], "out": tmp_path / "f.npz", "device": "cpu"} | changes
        with pytest.raises(ConfigError, match=message):
            embed(fields.pop("images"), made, fields.pop("out"), **fields)
    assert not list(tmp_path.iterdir())
