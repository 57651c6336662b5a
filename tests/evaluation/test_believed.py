"""What gives wrong numbers elsewhere: broken pictures, emptied labels, words beyond CTC, another precision."""

import csv
import random
import re

import numpy as np
import pytest

from rcmstr_fast.charset import Charset
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.evaluation.advice import charset_warning, emptied_warning, fitting_protocol
from rcmstr_fast.evaluation.decoder_data import open_words, training_words
from rcmstr_fast.evaluation.metrics import score
from rcmstr_fast.evaluation.network_files import load_recogniser
from rcmstr_fast.evaluation.probe import probe
from rcmstr_fast.evaluation.protocols import PROTOCOLS, get_protocol
from rcmstr_fast.evaluation.testing import write_predictions
from tests.evaluation.rendered import digits, picture, tiny_config, write_words
from tests.evaluation.test_probe import resized

FEWER = get_protocol("fewer_labels36")


def test_a_picture_that_cannot_be_decoded_is_misread_whatever_its_label():
    found = score(["", "a", "word", "two"], ["", "", "word", "two"], {0, 1})
    assert found.count == 4 and found.accuracy == 0.5 and found.ed1 == 0.5 and found.ned == 0.5
    assert found.cer == 1 / 8 and score([""], [""]).accuracy == 1.0 and score([""], [""], {0}).ned == 0.0


def test_a_set_of_broken_pictures_and_symbols(tmp_path):
    """Half the labels normalise to nothing: nothing of this set is right, and the table says why."""
    write_lmdb(tmp_path / "broken", [(b"no picture", "!!"), (b"", "7")] * 4)
    result = probe(tiny_config(tmp_path, steps=1, test=[f"b={tmp_path / 'broken'}"]))
    found = result.sets[0]
    assert found.score.accuracy == found.score.ed1 == found.score.ned == 0
    assert (found.score.count, found.total, found.emptied, found.broken) == (8, 8, 4, 8)
    text = (tmp_path / "run/log.txt").read_text()
    assert "8 broken pictures count as misread" in text
    assert "test b: fewer_labels36 leaves nothing of 4 of 8 labels" in text and "cased94 fits this set" in text
    assert "4 with an emptied label, 8 broken" in (tmp_path / "run/table.md").read_text()


@pytest.mark.parametrize(
    "label, folded, cased",
    [
        ("Word ", "word", False),
        ("cafe\u0301", "cafe", False),
        ("caf\u00e9", "caf", False),
        ("it's", "its", True),
        ("U.S.A", "usa", True),
        ("na\u00efve", "nave", False),
        ("\uff26\uff55\uff4c\uff4c", "", False),
        ("stra\u00dfe", "strae", False),
        ("\u0130stanbul", "istanbul", False),
        ("\u00b2", "", False),
    ],
)
def test_what_protocols_leave_of_a_label(label, folded, cased):
    """fewer_labels36 deletes what is not a letter or digit, as published evaluations do; cased94 leaves such words out."""
    assert FEWER.normalise(label) == folded
    kept, why_not = get_protocol("cased94").target(label)
    assert kept == label and (why_not is None) == cased


@pytest.mark.parametrize(
    "labels, fits",
    [(["!!", "?", "ok", "(a)"], "cased94"), (["你好", "京A1", "招牌"], "bctr"), (["é", "ß", "ñ"], "exact")],
)
def test_the_warning_names_the_protocol_that_fits(labels, fits):
    assert fitting_protocol(labels) == fits
    line = emptied_warning("test x", FEWER, labels)
    count = sum(not FEWER.normalise(label) for label in labels)
    assert f"nothing of {count} of {len(labels)}" in line and f"{fits} fits" in line
    assert emptied_warning("test x", FEWER, ["plain"] * 10 + ["!"]) == ""


def test_a_charset_that_keeps_few_labels(tmp_path, caplog):
    """31 of 200 are left of cased words with punctuation: what keeps them is named."""
    labels = ["plain"] * 31 + ["It's!"] * 169
    root = write_words(tmp_path / "a", labels[::10])
    training_words([root], get_protocol("cased94"), Charset.load("36"))
    assert "ONLY 4 of 20 labels" in caplog.text and "charset=94 with protocols=[cased94] keeps 20" in caplog.text
    line = charset_warning("train", get_protocol("exact"), Charset.load("36"), ["你好", "世界"], 0)
    assert "a charset file with the 4 characters of these labels" in line
    assert charset_warning("train", FEWER, Charset.load("36"), labels, 200) == ""


def test_words_beyond_ctc_are_dropped_counted_and_named(tmp_path):
    """Ten frames a word of 36 pixels: 5555555 needs 13, 12345678 eight."""
    tiny_config(tmp_path)
    labels = [*digits(12, 5), "5555555", "12345678", "1122334455"]
    write_words(tmp_path / "long", labels)
    write_words(tmp_path / "test2", ["5555555", "12"])
    config = tiny_config(
        tmp_path, train=[str(tmp_path / "long")], test=[f"t={tmp_path / 'test2'}"], steps=1, batch_size=4
    )
    result = probe(config)
    words = result.info["words"]["training"]
    reason = "needing more than 10 CTC frames (length + repeats)"
    assert words["dropped"][reason] == 2 and words["total"] == 15
    assert (result.sets[0].beyond_ctc, result.sets[0].score.count) == (1, 2)
    text = (tmp_path / "run/log.txt").read_text()
    assert "T = 10 frames a word; 2 words need more: '5555555', '1122334455'" in text
    assert "test t: 1 words need more frames than CTC has here, and are misread: '5555555'" in text
    assert reason in (tmp_path / "run/table.md").read_text()
    kept = training_words([str(tmp_path / "long")], FEWER, Charset.load("36"))
    assert len(kept) == 15  # another decoder spells them


def test_the_numbers_of_every_table_add_up(tmp_path):
    """kept + left out by each reason = total, over random sets with broken pictures, subsets and protocols."""
    draw = random.Random(0)

    def words(count):
        made = ["".join(draw.choices("ab1!é你 A", k=draw.choice([1, 2, 3, 30]))) for _ in range(count)]
        return [draw.choice([None, label, label]) for label in made]

    def write(name, labels):
        pictures = [picture("1", f"{name} {i}") if draw.random() < 0.8 else b"" for i in range(len(labels))]
        write_lmdb(tmp_path / name, zip(pictures, labels))
        return str(tmp_path / name)

    tests = {f"t{i}": words(draw.randint(8, 30)) for i in range(4)}
    names = [name for name in PROTOCOLS if name != "bctr"]
    result = probe(
        tiny_config(
            tmp_path,
            train=[write("random", words(80))],
            test=[f"{n}={write(n, x)}" for n, x in tests.items()],
            val=[],
            subset=0.5,
            steps=1,
            protocols=names,
            batch_size=4,
        )
    )
    shown = (tmp_path / "run/table.md").read_text()
    for entry in result.info["words"].values():
        assert entry["kept"] + sum(entry["dropped"].values()) == entry["total"], entry
    assert result.info["words"]["training"]["total"] == 80
    assert len(result.sets) == len(names) * len(tests)
    for found in result.sets:
        labels = [label for label in tests[found.set] if label]
        assert found.score.count + sum(found.dropped.values()) == found.total == len(labels)
        protocol = get_protocol(found.protocol)
        assert found.emptied == sum(protocol.target(x) == ("", None) for x in labels)
        assert f"| {found.set} ({found.protocol})" in shown
    for line in shown.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 5 and cells[1].isdigit():  # the table of words: N total, N kept, left out by each reason
            left_out = [int(part) for part in re.findall(r"(?:^|, )(\d+) ", cells[3])]
            assert int(cells[2]) + sum(left_out) == int(cells[1]), line


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_probe_and_read_agree(tmp_path, precision):
    """The recogniser's file knows its precision: the same pictures give the same texts, in other batches too."""
    probe(tiny_config(tmp_path, precision=precision, steps=4, decoder="attention", batch_size=16))
    rows = list(csv.DictReader((tmp_path / "run/predictions/digits.tsv").open(newline=""), delimiter="\t"))
    recogniser, facts = load_recogniser(tmp_path / "run")
    assert recogniser.precision == facts["precision"] == precision
    images = np.stack([resized(label) for label in open_words([str(tmp_path / "test")], "test").labels])
    texts, confidences = recogniser.read_images(images)
    assert texts == [row["prediction"] for row in rows]
    assert confidences == pytest.approx([float(row["confidence"]) for row in rows], abs=2e-4)


def test_pandas_reads_predictions_back_exactly(tmp_path):
    pandas = pytest.importorskip("pandas")
    texts = ['say "hi"', "a\tb", "a\nb", "a\rb", "a\r\nb", "NA", "", "007", " x ", "'", "你好", "\\t", '"', "null"]
    rows = [[f"set/{i}", text, text[::-1], "0.5000", 1] for i, text in enumerate(texts)]
    write_predictions(tmp_path / "p" / "x.tsv", rows)
    read = pandas.read_csv(tmp_path / "p" / "x.tsv", sep="\t", dtype=str, keep_default_na=False)
    assert list(read.columns) == ["name", "label", "prediction", "confidence", "correct"]
    assert read["label"].tolist() == texts and read["prediction"].tolist() == [text[::-1] for text in texts]
    assert picture("1") and read["correct"].tolist() == ["1"] * len(texts)


@pytest.mark.parametrize(
    "label, target, dropped",
    [("Two words!", "twowords", False), ("!!", "", False), ("é", "", True), ("x" * 26, "x" * 26, True)],
)
def test_u14m36(label, target, dropped):
    got, reason = get_protocol("u14m36").target(label)
    assert (got, reason is not None) == (target, dropped)
