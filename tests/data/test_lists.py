"""Lists of labels in every form: taken for what they are, and read alike by convert and by a folder as a root."""

import json
import os
import unicodedata
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.convert import convert
from rcmstr_fast.data.imports.plan import Options
from rcmstr_fast.data.lists import FORMATS, Listing, read_lists
from rcmstr_fast.data.names import Names
from rcmstr_fast.data.source import open_sources
from tests.data.pictures import lay, picture

LABELS = ["You", "Rescue", "new york", 'a "b" c', "5, 6", "中文", "100"]
FILES = [f"images/{i}.png" for i in range(len(LABELS))]
PAIRS = list(zip(FILES, LABELS))


def tsv(pairs=PAIRS, end="\n"):
    return "".join(f"{file}\t{label}{end}" for file, label in pairs)


def quoted(label):
    return '"' + label.replace('"', '""') + '"'


def table(head, pairs=PAIRS, delimiter=","):
    return head + "\n" + "".join(f"{file}{delimiter}{quoted(label)}\n" for file, label in pairs)


def renamed(change):
    return [(change(file), label) for file, label in PAIRS]


MMOCR = {"metainfo": {}, "data_list": [{"img_path": file, "instances": [{"text": label}]} for file, label in PAIRS]}
CASES = {
    "ours": ("labels.tsv", tsv(), "tsv"),
    "byte order mark and CR LF": ("labels.tsv", "\ufeff" + tsv(end="\r\n"), "tsv"),
    "UTF-16": ("labels.tsv", tsv().encode("utf-16"), "tsv"),
    "dot and slash": ("labels.tsv", tsv(renamed(lambda f: f"./{f}")), "tsv"),
    "backslashes": ("labels.tsv", tsv(renamed(lambda f: f.replace("/", "\\"))), "tsv"),
    "relative to images/": ("labels.tsv", tsv(renamed(lambda f: f[7:])), "tsv"),
    "absolute": ("labels.tsv", tsv(renamed(lambda f: f"/home/me/set/{f}")), "tsv"),
    "from a folder above": ("labels.tsv", tsv(renamed(lambda f: f"data/set/{f}")), "tsv"),
    "other case": ("labels.tsv", tsv(renamed(lambda f: f.replace("png", "PNG"))), "tsv"),
    "SynthTIGER": ("gt.txt", tsv(), "tsv"),
    "PaddleOCR": ("rec_gt_train.txt", tsv(), "tsv"),
    "PaddleOCR, several pictures": (
        "rec_gt_train.txt",
        "".join(f"{json.dumps([file])}\t{label}\n" for file, label in PAIRS),
        "tsv",
    ),
    "ICDAR": ("gt.txt", "\ufeff" + "".join('{}, "{}"\r\n'.format(f, s.replace('"', '\\"')) for f, s in PAIRS), "icdar"),
    "ICDAR without quotes": ("gt.txt", "".join(f"{file}, {label}\n" for file, label in PAIRS), "icdar"),
    "EasyOCR": ("labels.csv", table("filename,words"), "csv"),
    "Hugging Face": ("metadata.csv", table("file_name,text"), "csv"),
    "semicolons": ("labels.csv", table("image;label", delimiter=";"), "csv"),
    "Hugging Face, JSON lines": (
        "metadata.jsonl",
        "".join(json.dumps({"file_name": f, "text": s}) + "\n" for f, s in PAIRS),
        "jsonl",
    ),
    "MMOCR 0": ("train_label.jsonl", "".join(json.dumps({"filename": f, "text": s}) + "\n" for f, s in PAIRS), "jsonl"),
    "MMOCR 1": ("train.json", json.dumps(MMOCR), "json"),
    "one object": ("labels.json", json.dumps(dict(PAIRS)), "json"),
    "MMOCR lines": ("train_label.txt", "".join(f"{file} {label}\n" for file, label in PAIRS), "space"),
}


def labels_of(root):
    source = open_sources([root])
    every = range(len(source))
    return dict(zip(source.read(every), source.labels(every)))


EXPECTED = {picture(i): label for i, label in enumerate(LABELS)}


@pytest.mark.parametrize("case", CASES)
def test_every_form_means_the_same_to_convert_and_to_a_root(tmp_path, case, caplog):
    name, text, form = CASES[case]
    folder = lay(tmp_path / "in", {file: picture(i) for i, file in enumerate(FILES)} | {name: text})
    assert labels_of(folder) == EXPECTED
    report = convert(folder, tmp_path / "out")
    assert labels_of(tmp_path / "out") == EXPECTED
    assert report.written == report.total == len(LABELS) and not report.problems and not report.unlisted
    assert f"{name} taken for {form}: {FORMATS[form][0]}" in report.form
    assert convert(folder, tmp_path / "ordered", Options(form=form)).written == len(LABELS)


def test_mj_labels_are_in_the_file_names(tmp_path):
    files = {"2425/1/115_Lube_45484.jpg": "Lube", "2425/1/1_HOUSE_7.jpg": "HOUSE"}
    text = "".join(f"./{file} {file.rpartition('_')[2].removesuffix('.jpg')}\n" for file in files)
    pictures = {file: picture(i, format="JPEG") for i, file in enumerate(files)}
    convert(lay(tmp_path / "in", pictures | {"annotation_train.txt": text}), tmp_path / "out")
    assert labels_of(tmp_path / "out") == dict(zip(pictures.values(), files.values()))


def test_file_names_in_another_unicode_form(tmp_path):
    name = unicodedata.normalize("NFD", "images/café.png")
    folder = lay(tmp_path / "in", {name: picture(1), "labels.tsv": unicodedata.normalize("NFC", name) + "\tx\n"})
    assert labels_of(folder) == {picture(1): "x"}
    assert convert(folder, tmp_path / "out").written == 1


def test_a_windows_archive_with_backslashes_and_a_mac_one(tmp_path):
    with zipfile.ZipFile(tmp_path / "win.zip", "w") as archive:
        for i, file in enumerate(FILES):
            info = zipfile.ZipInfo("x")
            info.filename = file.replace("/", "\\")
            archive.writestr(info, picture(i))
        archive.writestr("labels.tsv", tsv())
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for i, file in enumerate(FILES):
            archive.writestr(f"set/{file}", picture(i))
            archive.writestr(f"__MACOSX/set/._{i}.png", b"x")
        archive.writestr("set/labels.tsv", tsv())
        archive.writestr("__MACOSX/set/._labels.tsv", b"\0\5")
    for name in ("win", "mac"):
        report = convert(tmp_path / f"{name}.zip", tmp_path / name)
        assert labels_of(tmp_path / name) == EXPECTED and not report.unlisted


def test_several_lists_count_together_and_can_be_chosen(tmp_path):
    pictures = {file: picture(i) for i, file in enumerate(FILES)}
    texts = {"rec_gt_train.txt": tsv(PAIRS[:4]), "rec_gt_test.txt": tsv(PAIRS[4:]), "README.txt": "about\tthis\n"}
    folder = lay(tmp_path / "in", pictures | texts)
    assert labels_of(folder) == EXPECTED
    assert convert(folder, tmp_path / "all").written == len(LABELS)
    report = convert(folder, tmp_path / "one", Options(lists=["rec_gt_test.txt"]))
    assert (report.written, report.unlisted) == (3, 4)
    assert "not read: rec_gt_train.txt" in report.form
    with pytest.raises(ConfigError, match=r"expected a list of labels x\.txt, found README\.txt, rec_gt_test"):
        convert(folder, tmp_path / "none", Options(lists=["x.txt"]))


def test_labels_tsv_counts_alone_and_the_other_list_is_named(tmp_path):
    lists = {"labels.tsv": tsv(), "gt.txt": tsv([(file, "other") for file in FILES])}
    folder = lay(tmp_path / "in", {file: picture(i) for i, file in enumerate(FILES)} | lists)
    assert labels_of(folder) == EXPECTED
    assert "not read: gt.txt" in convert(folder, tmp_path / "out").form


def test_the_first_of_two_labels_counts_everywhere(tmp_path):
    folder = lay(tmp_path / "in", {file: picture(i) for i, file in enumerate(FILES)})
    lay(folder, {"labels.tsv": tsv() + f"{FILES[0]}\tOTHER\n./{FILES[1]}\t{LABELS[1]}\n"})
    assert labels_of(folder) == EXPECTED
    report = convert(folder, tmp_path / "out")
    assert {reason: len(lines) for reason, lines in report.problems.items()} == {
        "listed twice with another label": 1,
        "listed twice": 1,
    }


def test_names_of_different_folders_never_become_one():
    names = Names(["1.png", "2.png"])
    names.learn(["a/1.png", "b/1.png"])
    assert [names.find("a/1.png"), names.find("b/1.png")] == ["1.png", None]
    names = Names(["x/1.png", "X/1.png", "3.png"])
    assert names.find("x/1.PNG") is None and names.find("3.PNG") == "3.png"


def test_an_order_that_does_not_fit_counts_what_it_cannot_read(tmp_path):
    folder = lay(tmp_path / "in", {FILES[0]: picture(0), "labels.tsv": tsv(PAIRS[:1])})
    with pytest.raises(ConfigError, match="1 not of the form json"):
        convert(folder, tmp_path / "out", Options(form="jsonl"))
    with pytest.raises(ConfigError, match=r"format must be one of lmdb, textseg, iam, .*, got excel"):
        convert(folder, tmp_path / "out", Options(form="excel"))


@pytest.mark.parametrize("encoding", ["gb18030", "big5", "shift_jis", "cp1252", "cp1251"])
def test_lists_in_other_encodings_are_told_and_mended(tmp_path, encoding, caplog):
    words = {
        "gb18030": ["北京市", "京A123"],
        "big5": ["臺北市", "中國人民"],
        "shift_jis": ["カタカナ", "ひらがな漢字"],
        "cp1252": ["café", "Straße"],
        "cp1251": ["Москва", "улица"],
    }[encoding]
    pairs = list(zip(FILES, [*words, "plain"]))
    folder = lay(tmp_path / "in", {file: picture(i) for i, (file, _) in enumerate(pairs)})
    lay(folder, {"labels.tsv": tsv(pairs).encode(encoding)})
    assert list(labels_of(folder).values()) == [None, None, "plain"]
    assert f"2 labels are not UTF-8 (they look like {encoding})" in caplog.text
    report = convert(folder, tmp_path / "plain")
    assert report.written == 1 and len(report.problems["label not UTF-8 (--mend mends it)"]) == 2
    for name, options in (("guessed", Options(mend=True)), ("told", Options(encoding=encoding))):
        report = convert(folder, tmp_path / name, options)
        assert list(labels_of(tmp_path / name).values()) == [*words, "plain"]
        assert report.faults == ({"not UTF-8": 2} if options.mend else {})
    with pytest.raises(ConfigError, match="expected text in the encoding utf-99"):
        convert(folder, tmp_path / "no", Options(encoding="utf-99"))


_WORDS = st.text(st.sampled_from('ab "\t,\\/é\r\ud800'.replace("\ud800", "\udcff") + "中"), max_size=4)
_LINES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([f"{i}.png" for i in range(6)] + ["x/1.png"]), _WORDS).map("\t".join),
        _WORDS,
        st.just(""),
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(_LINES, st.sampled_from([*FORMATS]), st.booleans())
def test_lines_that_count_and_lines_that_do_not_are_all_lines(lines, form, ordered):
    text = "\n".join(lines).encode("utf-8", "surrogateescape")
    names = Names([f"{i}.png" for i in range(5)] + ["labels.tsv"])
    listing = read_lists(names, lambda name: text, order=form if ordered else "")
    assert isinstance(listing, Listing)
    assert listing.total == len(listing.labels) + sum(map(len, listing.problems.values()))
    if listing.lists.get("labels.tsv") in ("tsv", "space", "icdar", "mj"):
        assert listing.total == sum(bool(line.removesuffix("\r")) for line in "\n".join(lines).split("\n"))
    assert set(listing.labels) <= names.names and listing.describe()


_KINDS = ["good", "cut", "html", "empty", "missing", "gbk", "none"]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(_KINDS)), max_size=12))
def test_written_and_left_out_are_everything(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("sums")
    content = {
        "good": picture(7),
        "cut": picture(7)[:40],
        "html": b"<html>",
        "empty": b"",
        "gbk": picture(8),
        "none": picture(9),
    }
    lines = []
    for number, (which, kind) in enumerate(entries):
        name = f"{which}_{kind}.png"
        lay(folder / "in", {name: content[kind]} if kind in content else {})
        label = "北京".encode("gb18030") if kind == "gbk" else b"" if kind == "none" else b"w%d" % number
        lines.append(name.encode() + b"\t" + label)
    lay(folder / "in", {"labels.tsv": b"\n".join(lines), "extra.png": picture(1)})
    try:
        report = convert(folder / "in", folder / "out")
    except ConfigError as error:
        assert "nothing to convert" in str(error)
        assert not {kind for _, kind in entries} & {"good", "none"}
        return
    assert report.total == len(entries) == report.written + sum(map(len, report.problems.values()))
    assert report.written == sum(report.parts.values()) == len(open_sources([folder / "out"]))
    assert report.written == len({entry for entry in entries if entry[1] in ("good", "none")})
    assert report.unlabelled == len({entry for entry in entries if entry[1] == "none"})
    assert os.path.isdir(folder / "out")
