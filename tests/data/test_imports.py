"""IAM, CVL, RIMES, Union14M-L, BCTR and TextSeg, each as a small made-up copy of its layout."""

import io
import json
import zipfile

import lmdb
import numpy as np
import pytest
from PIL import Image

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.convert import convert
from rcmstr_fast.data.imports.handwriting import _writer_part
from rcmstr_fast.data.imports.plan import Options
from rcmstr_fast.data.source import open_sources
from tests.data.pictures import lay, picture


def parts(out):
    """Part -> label -> picture."""
    source = open_sources([out])
    found = {}
    for one in source.sets:
        every = range(len(one))
        found[one.name if len(source.sets) > 1 else ""] = dict(zip(one.labels(every), one.read(every)))
    return found


def sums(report):
    assert report.total == report.written + sum(map(len, report.problems.values()))
    assert report.written == sum(report.parts.values())
    return {reason: len(names) for reason, names in report.problems.items()}


IAM_WORDS = """#--- words.txt ---------------------------------------------------------------#
#
# format: a01-000u-00-00 ok 154 1 408 768 27 51 AT A
#
a01-000u-00-00 ok 154 408 768 27 51 AT A
a01-000u-00-01 err 154 507 766 213 48 NN MOVE
a01-000u-01-00 ok 154 796 764 70 50 TO to be
b02-001-00-00 ok 160 1 796 764 70 50 TO "
c03-002a-00-00 ok 160 796 764 70 50 NP #7
c03-002a-00-01 ok 160 -1 -1 -1 -1 . ,
c03-002a-00-02 ok 160 1 2 3 4 NN gone
nonsense
"""
IAM_LABELS = {
    "a01-000u-00-00": "A",
    "a01-000u-00-01": "MOVE",
    "a01-000u-01-00": "to be",
    "b02-001-00-00": '"',
    "c03-002a-00-00": "#7",
    "c03-002a-00-01": ",",
}


@pytest.fixture
def iam(tmp_path):
    def place(word):
        form = word.rsplit("-", 2)[0]
        return f"words/{word[:3]}/{form}/{word}.png"

    pictures = {place(word): picture(i) for i, word in enumerate(IAM_LABELS)}
    return lay(tmp_path / "IAM", pictures | {"ascii/words.txt": IAM_WORDS})


def test_iam_without_splits_and_without_xml(iam, tmp_path):
    report = convert(iam, tmp_path / "out")
    assert sums(report) == {"segmentation marked err": 1, "file missing": 1, "not a line of words.txt": 1}
    assert report.problems["segmentation marked err"] == ["a01-000u-00-01"]
    assert parts(tmp_path / "out") == {
        "": {label: picture(i) for i, (word, label) in enumerate(IAM_LABELS.items()) if label != "MOVE"}
    }
    assert report.form == "IAM: ascii/words.txt"
    kept = convert(iam, tmp_path / "kept", Options(keep_err=True))
    assert kept.written == 6 and "MOVE" in parts(tmp_path / "kept")[""]


@pytest.mark.parametrize("names", [("trainset", "validationset1", "testset"), ("tr", "va1", "te")])
def test_iam_with_the_lists_of_its_task(iam, tmp_path, names):
    ending = ".txt" if len(names[0]) > 2 else ".lst"
    lists = zip(names, ("a01-000u-00\na01-000u-01\n", "b02-001-00\n", "c03-002a\n"))
    lay(iam, {f"task/{name}{ending}": text for name, text in lists})
    report = convert(iam, tmp_path / "out", Options(keep_err=True))
    assert {part: set(words) for part, words in parts(tmp_path / "out").items()} == {
        "train": {"A", "MOVE", "to be"},
        "val1": {'"'},
        "test": {"#7", ","},
    }
    assert report.parts == {"train": 3, "val1": 1, "test": 2} and sums(report)
    assert convert(iam, tmp_path / "one", Options(split="none")).parts == {"": 5}


@pytest.mark.parametrize("xml", [False, True])
def test_iam_by_writers(iam, tmp_path, xml):
    writers = {"a01-000u": "000", "b02-001": "001", "c03-002a": "002"}
    if xml:
        texts = {f"xml/{form}.xml": f'<form id="{form}" writer-id="{writer}"/>' for form, writer in writers.items()}
    else:
        texts = {"ascii/forms.txt": "# forms\n" + "".join(f"{f} {w} 2 prt 7 5 52 36\n" for f, w in writers.items())}
    with pytest.raises(ConfigError, match=r"split=writers must have IAM's forms\.txt or xml/"):
        convert(iam, tmp_path / "no", Options(split="writers"))
    report = convert(lay(iam, texts), tmp_path / "out", Options(split="writers"))
    assert set(report.parts) == {_writer_part(writer) for writer in writers.values()} and sums(report)


def test_writers_are_dealt_eight_one_one():
    dealt = [_writer_part(f"{i:03d}") for i in range(1000)]
    assert [round(dealt.count(part) / 100) for part in ("train", "val", "test")] == [8, 1, 1]


def test_cvl(tmp_path):
    files = {
        "cvl-database-1-1/trainset/words/0001/0001-1-0-0-Imagine.tif": picture(1, format="TIFF"),
        "cvl-database-1-1/trainset/words/0001/0001-6-2-3-Straße.tif": picture(2, format="TIFF"),
        "cvl-database-1-1/testset/words/0052/0052-1-0-1-a-b.tif": picture(3, format="TIFF"),
        "cvl-database-1-1/testset/lines/0052/0052-1-0.tif": picture(4, format="TIFF"),
        "cvl-database-1-1/testset/words/0052/0052-1-0-2-cut.tif": picture(5, format="TIFF")[:50],
    }
    report = convert(lay(tmp_path / "in", files), tmp_path / "out")
    assert report.form.startswith("CVL") and sums(report) == {"damaged picture": 1} and report.unlisted == 1
    assert {part: set(words) for part, words in parts(tmp_path / "out").items()} == {
        "train": {"Imagine", "Straße"},
        "test": {"a-b"},
    }
    split = convert(tmp_path / "in", tmp_path / "writers", Options(split="writers"))
    assert set(split.parts) == {_writer_part("0001"), _writer_part("0052")}


def test_rimes(tmp_path):
    files = {
        "trainingsnippets_icdar/training_WR/lot_1/lot_1/0000.png": picture(1),
        "trainingsnippets_icdar/training_WR/lot_1/lot_1/0001.png": picture(2),
        "validationsnippets_icdar/testdataset_ICDAR/lot_14/0000.png": picture(3),
        "data_test/lot_16/0000.png": picture(4),
        "groundtruth_training_icdar2011.txt": "\ufefflot_1/lot_1/0000.png bonjour\r\nlot_1/lot_1/0001.png d'été\r\n",
        "ground_truth_validation_icdar2011.txt": "lot_14/0000.png Madame\nlot_14/0009.png x\n",
        "grount_truth_test_icdar2011.txt": "lot_16/0000.png s'il vous\n",
    }
    report = convert(lay(tmp_path / "in", files), tmp_path / "out")
    assert report.form.startswith("RIMES") and sums(report) == {"file missing": 1}
    assert parts(tmp_path / "out") == {
        "train": {"bonjour": picture(1), "d'été": picture(2)},
        "val": {"Madame": picture(3)},
        "test": {"s'il vous": picture(4)},
    }
    with pytest.raises(ConfigError, match="does not name its writers"):
        convert(tmp_path / "in", tmp_path / "no", Options(split="writers"))


def mmocr(pairs):
    entries = [{"img_path": file, "instances": [{"text": label}]} for file, label in pairs]
    return json.dumps({"metainfo": {"dataset_type": "TextRecogDataset"}, "data_list": entries})


def test_union14m(tmp_path):
    files = {f"Union14M-L/full_images/art/{i}.jpg": picture(i, format="JPEG") for i in range(5)}
    lists = {
        "Union14M-L/train_annos/mmocr1.0/train_hard.json": mmocr(
            [("full_images/art/0.jpg", "zero"), ("full_images/art/9.jpg", "gone")]
        ),
        "Union14M-L/train_annos/mmocr-0.x/train_hard.jsonl": json.dumps(
            {"filename": "full_images/art/0.jpg", "text": "old"}
        ),
        "Union14M-L/train_annos/mmocr-0.x/train_easy.jsonl": "".join(
            json.dumps({"filename": f"full_images/art/{i}.jpg", "text": f"w{i}"}) + "\n" for i in (1, 2)
        ),
        "Union14M-Benchmarks/curve/annotation.json": mmocr([("imgs/7.jpg", "curved")]),
        "Union14M-Benchmarks/curve/imgs/7.jpg": picture(7, format="JPEG"),
        "Union14M-Benchmarks/general/annotation.json": mmocr([("imgs/7.jpg", "other")]),
        "Union14M-Benchmarks/general/imgs/7.jpg": picture(8, format="JPEG"),
    }
    report = convert(lay(tmp_path / "in", files | lists), tmp_path / "out")
    assert report.form.startswith("Union14M") and sums(report) == {"file missing": 1}
    assert parts(tmp_path / "out") == {
        "train_hard": {"zero": picture(0, format="JPEG")},
        "train_easy": {f"w{i}": picture(i, format="JPEG") for i in (1, 2)},
        "curve": {"curved": picture(7, format="JPEG")},
        "general": {"other": picture(8, format="JPEG")},
    }


def test_bctr_databases_stay_apart_and_are_cleaned(tmp_path):
    for name, words in {"scene_train": ["北京", "e\u0301"], "scene_test": ["上海 ", "x"]}.items():
        (tmp_path / "bctr" / name).mkdir(parents=True)
        with lmdb.open(str(tmp_path / "bctr" / name), map_size=1 << 22) as env, env.begin(write=True) as txn:
            for i, word in enumerate(words, 1):
                txn.put(b"image-%09d" % i, b"" if word == "x" else picture(i))
                txn.put(b"label-%09d" % i, word.encode())
            txn.put(b"num-samples", b"2")
    report = convert(tmp_path / "bctr", tmp_path / "out", Options(mend=True))
    assert parts(tmp_path / "out") == {
        "scene_test": {"上海": picture(1)},
        "scene_train": {"北京": picture(1), "\u00e9": picture(2)},
    }
    assert sums(report) == {"damaged picture": 1} and sum(report.faults.values()) == 2
    one = convert(tmp_path / "bctr" / "scene_train", tmp_path / "one")
    assert one.parts == {"": 2} and not one.mended and len(one.faults) == 1


def test_no_part_is_written_elsewhere(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../annotation.json", mmocr([("1.png", "x")]))
        archive.writestr("1.png", picture(1))
    with pytest.raises(ConfigError, match="would be written outside"):
        convert(tmp_path / "evil.zip", tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())


def encoded(array, format="PNG"):
    out = io.BytesIO()
    Image.fromarray(array).save(out, format)
    return out.getvalue()


@pytest.fixture
def textseg(tmp_path):
    picture_of = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[12:18, 11:29] = 100
    mask[18:20, 11:29] = 200  # effects of the word
    mask[25:30, 35:55] = 255  # not decided
    words = {
        "0": {"text": "Hello", "bbox": [10, 10, 30, 11, 30.4, 20, 9.6, 20], "char": {}},
        "1": {"text": "two\twords", "bbox": [35, 25, 70, 25, 70, 45, 35, 45]},
        "2": {"text": "none"},
        "../3": {"text": "evil", "bbox": [1, 1, 9, 9]},
    }
    files = {
        "image/a001.jpg": encoded(picture_of, "PNG"),
        "semantic_label/a001_maskfg.png": encoded(mask),
        "annotation/a001_anno.json": json.dumps(words),
        "image/a002.jpg": encoded(picture_of, "PNG"),
        "semantic_label/a002_maskfg.png": encoded(mask[:20]),
        "bpoly_label/a002_anno.json": json.dumps({"0": words["0"]}),
        "semantic_label/a003_maskfg.png": encoded(mask),
        "semantic_label/a004_maskfg.png": encoded(mask),
        "annotation/a004_anno.json": "no json",
    }
    return lay(tmp_path / "TextSeg", files), picture_of, mask


def test_textseg_patches(textseg, tmp_path):
    folder, whole, mask = textseg
    report = convert(folder, tmp_path / "out")
    assert sums(report) == {
        "no usable box": 2,
        "mask of another size than its picture": 1,
        "annotation missing or unreadable": 2,
    }
    assert (tmp_path / "out/pairs.tsv").read_text() == (
        "images/a001_0.png\tmasks/a001_0.png\tHello\nimages/a001_1.png\tmasks/a001_1.png\ttwo words\n"
    )
    boxes = {"a001_0": (9, 10, 31, 20), "a001_1": (35, 25, 60, 40)}
    for name, (left, top, right, bottom) in boxes.items():
        assert (np.asarray(Image.open(tmp_path / f"out/images/{name}.png")) == whole[top:bottom, left:right]).all()
        cut = np.asarray(Image.open(tmp_path / f"out/masks/{name}.png"))
        assert (cut == 255 * (mask[top:bottom, left:right] == 100)).all()
    assert np.asarray(Image.open(tmp_path / "out/masks/a001_0.png")).any()


def test_textseg_in_its_parts(textseg, tmp_path):
    folder, _, _ = textseg
    lay(folder, {"split.json": json.dumps({"train": ["a001"], "test": ["a002", "a004"], "../x": ["a003"]})})
    report = convert(folder, tmp_path / "out")
    assert report.parts == {"train": 2} and (tmp_path / "out/train/pairs.tsv").exists()
    assert sums(report)["in no part of split.json"] == 1
    assert convert(folder, tmp_path / "one", Options(split="none")).parts == {"": 2}


def test_a_layout_that_is_ordered_and_not_there(tmp_path):
    folder = lay(tmp_path / "in", {"1.png": picture(1), "labels.tsv": "1.png\tx\n"})
    for form in ("iam", "cvl", "rimes", "union14m"):
        with pytest.raises(ConfigError, match=f"expected the layout of {form}"):
            convert(folder, tmp_path / "out", Options(form=form))
    with pytest.raises(ConfigError, match="nothing to convert"):
        convert(folder, tmp_path / "out", Options(form="textseg"))
    with pytest.raises(ConfigError, match="split=writers is for IAM and CVL"):
        convert(folder, tmp_path / "out", Options(split="writers"))
    assert not (tmp_path / "out").exists()
