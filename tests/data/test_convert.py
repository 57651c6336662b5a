import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.convert import convert
from rcmstr_fast.data.imports import files as module
from rcmstr_fast.data.source import open_sources

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "svt_train.zip"


def picture(value: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((8, 20, 3), value, np.uint8)).save(data, "PNG")
    return data.getvalue()


FILES = {f"images/{i}.png": picture(i) for i in range(4)}
LIST = "images/0.png\tzero\nimages/1.png\tEins \u4e2d\nimages/2.png\t\n"


def as_folder(path: Path, files: dict[str, bytes], name: str, text: bytes) -> Path:
    for file, data in {**files, name: text}.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(data)
    return path


def as_zip(path: Path, files: dict[str, bytes], name: str, text: bytes) -> Path:
    path = path.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, data in {**files, name: text}.items():
            archive.writestr(file, data)
    return path


@pytest.fixture(params=[as_folder, as_zip])
def make(request, tmp_path):
    return lambda text, name="labels.tsv", files=FILES: request.param(tmp_path / "in", files, name, text)


def read(folder: Path):
    source = open_sources([str(folder)])
    every = range(len(source))
    return source.read(every), source.labels(every)


@pytest.mark.parametrize("encode", [lambda s: s.encode(), lambda s: s.encode("utf-8-sig").replace(b"\n", b"\r\n")])
def test_pictures_and_labels_arrive(make, tmp_path, encode):
    report = convert(make(encode(LIST)), tmp_path / "out")
    images, labels = read(tmp_path / "out")
    assert images == [FILES[f"images/{i}.png"] for i in range(3)]
    assert labels == ["zero", "Eins \u4e2d", None]
    assert (report.written, report.unlabelled, report.unlisted, report.problems) == (3, 1, 1, {})


def test_synthtiger_list_and_names_relative_to_images(make, tmp_path):
    convert(make(b"images/3.png\tthree\n", "gt.txt"), tmp_path / "a")
    assert read(tmp_path / "a") == ([FILES["images/3.png"]], ["three"])


def test_bare_names_are_looked_for_in_images(make, tmp_path):
    convert(make(b"3.png\tthree\n./images/1.png\tone\n"), tmp_path / "a")
    assert read(tmp_path / "a")[1] == ["three", "one"]


def test_what_is_left_out_is_named(make, tmp_path):
    files = FILES | {"images/empty.png": b""}
    text = LIST + "nothing.png\tx\nno tab here\nimages/0.png\tagain\nimages/empty.png\ty\n\n"
    report = convert(make(text.encode(), files=files), tmp_path / "out")
    assert report.written == 3
    assert report.problems == {
        "file missing": ["nothing.png"],
        "not of the form tsv": ["labels.tsv, line 5: 'no tab here'"],
        "listed twice with another label": ["labels.tsv, line 6: images/0.png"],
        "file unreadable": ["images/empty.png: zero bytes"],
    }
    assert read(tmp_path / "out")[1][0] == "zero"


def test_labels_keep_tabs_and_other_separators(make, tmp_path):
    convert(make("images/0.png\ta\tb\u2028c\n".encode()), tmp_path / "out")
    assert read(tmp_path / "out")[1] == ["a\tb\u2028c"]


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "images/../../secret.png", "..\\secret.png", "link.png"]
)
def test_paths_out_of_the_folder_are_refused(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(picture(9))
    folder = as_folder(tmp_path / "in", FILES, "labels.tsv", f"images/0.png\tok\n{name}\tbad\n".encode())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    report = convert(folder, tmp_path / "out")
    assert report.written == 1 and len(report.problems) == 1
    assert read(tmp_path / "out")[0] == [FILES["images/0.png"]]


def test_zip_paths_touch_no_disk(tmp_path):
    files = {"../evil.png": picture(1), "/abs.png": picture(2)}
    path = as_zip(tmp_path / "in", files, "labels.tsv", b"../evil.png\ta\n/abs.png\tb\n")
    assert convert(path, tmp_path / "deep" / "out").written == 2
    assert not (tmp_path / "evil.png").exists() and not (tmp_path / "deep" / "evil.png").exists()


def test_a_zip_bomb_is_one_unreadable_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 100_000)
    files = FILES | {"images/bomb.png": bytes(5_000_000)}
    report = convert(
        as_zip(tmp_path / "in", files, "labels.tsv", (LIST + "images/bomb.png\tx\n").encode()), tmp_path / "out"
    )
    assert report.written == 3
    assert report.problems == {"file unreadable": ["images/bomb.png: larger than 100000 bytes"]}


def test_damaged_entries_are_named(tmp_path):
    path = as_zip(tmp_path / "in", FILES, "labels.tsv", LIST.encode())
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("images/1.png").header_offset
    data[start + 30 + len("images/1.png") + 3] ^= 0xFF
    path.write_bytes(bytes(data))
    report = convert(path, tmp_path / "out")
    assert report.written == 2 and report.problems["file unreadable"][0].startswith("images/1.png: ")


def test_a_list_inside_an_enclosing_folder(tmp_path):
    files = {f"set/{name}": data for name, data in FILES.items()}
    assert convert(as_zip(tmp_path / "in", files, "set/labels.tsv", LIST.encode()), tmp_path / "out").written == 3


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (b"x", "other.txt", "expected a list of labels"),
        (b"images/0.png\t\xff\n", "labels.tsv", "1 label not UTF-8"),
        (b"", "labels.tsv", "the list is empty"),
        (b"nowhere.png\tx\n", "labels.tsv", "1 file missing"),
    ],
)
def test_errors_leave_nothing_behind(make, tmp_path, text, name, message):
    source = make(text, name)
    with pytest.raises(ConfigError, match=message):
        convert(source, tmp_path / "out")
    assert [path for path in tmp_path.iterdir() if path != source] == []


def test_wrong_inputs_and_outputs(make, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        convert(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(ConfigError, match=r"expected a folder or a \.zip"):
        convert(tmp_path / "text.zip", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(ConfigError, match="new or empty folder"):
        convert(make(LIST.encode()), tmp_path / "out")


def test_pictures_with_masks_are_no_words(make, tmp_path):
    """Their list looks like one of labels, the names of the masks."""
    with pytest.raises(ConfigError, match=r"pictures with masks \(pairs.tsv\), which rcmstr segment takes"):
        convert(make(b"images/0.png\timages/1.png\n", name="pairs.tsv"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not REAL.exists(), reason="real words (../shared/data) are not at hand")
def test_real_words(tmp_path):
    report = convert(REAL, tmp_path / "out")
    assert report.written == 257 and not report.problems
    images, labels = read(tmp_path / "out")
    with zipfile.ZipFile(REAL) as archive:
        first = archive.read("labels.tsv").decode().split("\n")[0].split("\t")
        assert archive.read(first[0]) == images[0]
    assert labels[0] == first[1] and all(labels)
