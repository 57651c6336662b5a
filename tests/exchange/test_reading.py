"""Reading: any pictures, the same texts as the decoders give, restriction, lexicon, calibration, tables."""

import csv
import io
import json

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation.decoder_data import open_words
from rcmstr_fast.evaluation.network_files import load_recogniser
from rcmstr_fast.evaluation.recogniser import Recogniser
from rcmstr_fast.exchange.calibrate import _error, calibrate, validation_words
from rcmstr_fast.exchange.inputs import open_inputs
from rcmstr_fast.exchange.lexicon import Lexicon, Match
from rcmstr_fast.exchange.reading import Reader, Reading, Scores, words_of
from rcmstr_fast.exchange.tables import Table, format_of
from tests.evaluation.rendered import digits, picture, write_words
from tests.exchange.tiny import CNN, VIT, write_recogniser


def pixels(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, *size, 3), dtype=np.uint8)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("decoder", "model"), [("ctc", CNN), ("attention", CNN), ("transformer", VIT)])
def test_texts_and_confidences_are_the_decoders_own(tmp_path, decoder, model, normalise):
    recogniser = write_recogniser(tmp_path / "recogniser.safetensors", decoder, normalise=normalise, **model)
    reader, images = Reader.load(tmp_path, device="cpu"), pixels(6, recogniser.size)
    readings = reader.read_pixels(images)
    texts, confidences = recogniser.read_images(images)
    assert [r.text for r in readings] == texts and any(texts)
    assert [r.confidence for r in readings] == pytest.approx(confidences, rel=1e-4)
    traced = recogniser.trace(recogniser.frames(recogniser.views(torch.from_numpy(images), index=torch.arange(6))))
    for reading, ids, each in zip(readings, traced.ids.tolist(), traced.probabilities.tolist()):
        first = recogniser.decoder.num_special
        assert reading.characters == pytest.approx([p for i, p in zip(ids, each) if i >= first], rel=1e-4)


def test_kinds_of_pictures(tmp_path):
    write_recogniser(tmp_path / "recogniser.safetensors", **CNN)
    (tmp_path / "a.png").write_bytes(picture("12"))
    opened = Image.open(io.BytesIO(picture("12")))
    given = [
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        picture("12"),
        np.asarray(opened),
        opened,
        np.zeros((9, 9), np.uint8),
        tmp_path / "absent.png",
        b"junk",
        np.zeros((3, 3), np.float32),
    ]
    readings = Reader.load(tmp_path, device="cpu").read(given, batch_size=2)
    assert readings[0].error is None and readings[0] == readings[1] == readings[2] == readings[3] == readings[4]
    assert readings[5].error is None
    assert readings[6].error == "No such file or directory" and "not a picture" in readings[7].error
    assert "uint8" in readings[8].error and readings[8].text == ""
    with pytest.raises(TypeError, match="a picture must be"):
        Reader.load(tmp_path, device="cpu").read([7])


def test_a_character_of_several_frames_is_written_once():
    recogniser = type("R", (), {})()
    recogniser.decoder, recogniser.charset = type("D", (), {"num_special": 1})(), Charset("ab")
    logits = torch.tensor([[[0, 4, 0], [0, 3, 0], [5, 0, 0], [0, 2, 0], [0, 0, 3], [0, 0, 1.0]]])
    (reading,) = words_of(Scores(logits, logits.argmax(2)), recogniser, 1.0)
    best = logits.softmax(2).amax(2)[0].tolist()
    assert reading.text == "aab"
    assert reading.characters == pytest.approx([max(best[:2]), best[3], max(best[4:])])
    assert reading.confidence == pytest.approx(np.prod(best))


@pytest.mark.parametrize(("decoder", "model"), [("ctc", CNN), ("attention", CNN), ("transformer", VIT)])
def test_only_characters_of_the_charset_are_written(tmp_path, decoder, model):
    recogniser = write_recogniser(tmp_path / "recogniser.safetensors", decoder, charset="94", **model)
    reader, images = Reader.load(tmp_path, device="cpu"), pixels(8, recogniser.size)
    free = "".join(r.text for r in reader.read_pixels(images))
    reader.restrict(Charset("0123456789"))
    restricted = reader.read_pixels(images)
    text = "".join(r.text for r in restricted)
    assert not set(free) <= set("0123456789") and set(text) <= set("0123456789")
    assert all(0 <= r.confidence <= 1 for r in restricted)
    with pytest.raises(ConfigError, match="knows none"):
        reader.restrict(Charset("é"))


def test_nearest_words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("Street\nmarket\nstreet\r\nMain road\n", encoding="utf-8")
    lexicon = Lexicon.load(str(path), fold=True)
    assert lexicon.nearest("street") == Match("Street", 0) and lexicon.nearest("markt") == Match("market", 1)
    assert lexicon.nearest("mainroad") == Match("Main road", 1)
    assert Lexicon.load(str(path), fold=False).nearest("street") == Match("street", 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\n\nb\n", "line 2 is empty"),
        (b"", "it is empty"),
        (b"a\n \n", "line 2"),
        (b"\xff\xfe", "UTF-8"),
        (None, "exist"),
    ],
)
def test_wrong_lexicons(tmp_path, content, message):
    if content is not None:
        (tmp_path / "words").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        Lexicon.load(str(tmp_path / "words"), fold=True)
    assert "\n" not in str(raised.value)


def test_tables_are_read_back_by_pandas():
    words = [("a,b.png", Reading('say "hi"', 0.5, (0.5, 1.0))), ("tab\t.png", Reading("a\nb", 0.25, (0.25,)))]
    out = io.StringIO()
    table = Table(out, "csv", lexicon=True)
    assert [table.add(name, reading, Match(reading.text, 1)) for name, reading in words] == [None, None]
    out.seek(0)
    frame = pandas.read_csv(out, keep_default_na=False)
    assert frame["file"].tolist() == [name for name, _ in words]
    assert frame["text"].tolist() == [reading.text for _, reading in words] == frame["read"].tolist()
    assert frame["confidence"].tolist() == [0.5, 0.25] and frame["characters"][0] == "0.5000 1.0000"
    out = io.StringIO()
    table = Table(out, "jsonl", lexicon=False)
    for name, reading in words:
        table.add(name, reading)
    assert [json.loads(line)["text"] for line in out.getvalue().splitlines()] == ['say "hi"', "a\nb"]
    for kind in ("text", "labels"):
        table = Table(io.StringIO(), kind, lexicon=False)
        assert table.add(*words[0]) is None and "csv and jsonl can hold it" in table.add(*words[1])


def test_formats_by_suffix():
    assert [format_of("auto", name) for name in ("", "a.csv", "a.JSONL", "labels.tsv", "a.txt")] == [
        "text",
        "csv",
        "jsonl",
        "labels",
        "text",
    ]
    assert format_of("csv", "a.odd") == "csv"
    with pytest.raises(ConfigError, match="out must end in"):
        format_of("auto", "a.odd")


def test_inputs(tmp_path, monkeypatch):
    for folder, names in (("one", "ab"), ("two/deep", "c")):
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            (tmp_path / folder / f"{name}.png").write_bytes(picture(name))
    write_words(tmp_path / "lmdb", ["1", "2", "3"])
    monkeypatch.chdir(tmp_path)
    found = open_inputs(["one", "two/**/*.png", "lmdb", "lmdb/data.mdb", "absent.png", "one/a.png", "-"])
    batches = list(found.batches(2, io.StringIO("two/deep/c.png\r\n\nnowhere.png\n")))
    names = [name for batch, _ in batches for name in batch]
    contents = [data for _, batch in batches for data in batch]
    assert found.total is None and open_inputs(["one", "lmdb"]).total == 5
    assert names[:3] == ["one/a.png", "one/b.png", "two/deep/c.png"]
    assert names[-4:] == ["absent.png", "one/a.png", "two/deep/c.png", "nowhere.png"] and len(names) == 13
    assert all(len(batch) <= 2 for batch, _ in batches)
    assert [data is None for data in contents] == [name in ("absent.png", "nowhere.png") for name in names]
    for wrong, message in ((["*.jpg"], "no file or folder matches"), (["-", "-"], "once"), (["two/deep", "."], None)):
        if message:
            with pytest.raises(ConfigError, match=message):
                open_inputs(wrong)


def test_calibration_lowers_the_error_and_is_kept(tmp_path):
    write_recogniser(tmp_path / "recogniser.safetensors", facts={"protocol": "exact"}, **CNN)
    words = digits(40, 3)
    reader = Reader.load(tmp_path, device="cpu")
    # Half of the labels are what the recogniser reads: it is right there, at whatever confidence.
    read = [r.text or "?" for r in reader.read([picture(word) for word in words])]
    from rcmstr_fast.data.lmdb_writer import write_lmdb

    labels = [text if i % 2 else "wrong" for i, text in enumerate(read)]
    write_lmdb(tmp_path / "known", ((picture(word), label) for word, label in zip(words, labels)))
    made = calibrate(reader, open_words([str(tmp_path / "known")], "calibrate"), "known")
    assert made.words == 40 and made.temperature == reader.temperature != 1.0
    assert made.error_after <= made.error_before and "fitted on 40 validation words (known)" in made.describe()
    reader.recogniser.save(tmp_path / "kept.safetensors", {"calibration": vars(made)})
    again = Reader.load(tmp_path / "kept.safetensors", device="cpu")
    assert again.temperature == made.temperature
    assert again.read([picture("7")])[0].text == Reader.load(tmp_path, device="cpu").read([picture("7")])[0].text


def test_expected_calibration_error():
    confidence, right = torch.tensor([0.95, 0.95, 0.15, 0.15]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert _error(confidence, right) == pytest.approx((abs(1.9 - 1) + 0.3) / 4)


def test_validation_words_of_a_run(tmp_path):
    roots = [write_words(tmp_path / "train", ["1", "2", "3"])]
    (tmp_path / "words.json").write_text(json.dumps({"val": {"roots": roots, "records": [0, 2]}}))
    words, source = validation_words(tmp_path, ["val"])
    assert words.labels == ["1", "3"] and "the run's own" in source
    with pytest.raises(ConfigError, match=r"calibrate=val needs the words\.json"):
        validation_words(tmp_path / "train", ["val"])
    write_recogniser(tmp_path / "recogniser.safetensors", **CNN)
    with pytest.raises(ConfigError, match="ten words or more"):
        calibrate(Reader.load(tmp_path, device="cpu"), words, source)


def test_values_that_are_not_finite_are_refused_by_name(tmp_path):
    made: Recogniser = write_recogniser(tmp_path / "recogniser.safetensors", **CNN)
    with torch.no_grad():
        made.decoder.classifier.bias[2] = torch.inf
    made.save(tmp_path / "recogniser.safetensors", {})
    with pytest.raises(
        ConfigError, match=r"tensor decoder.classifier.bias has 1 of 37 values that are NaN or infinite"
    ):
        load_recogniser(tmp_path)


def test_csv_is_rfc_4180():
    out = io.StringIO()
    Table(out, "csv", lexicon=False).add("a", Reading('"', 1.0, (1.0,)))
    assert list(csv.reader(io.StringIO(out.getvalue())))[1][1] == '"'
