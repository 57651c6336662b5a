"""open_sources: LMDBs and folders as one list, and one clear line for everything that is neither."""

import logging
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest

from rcmstr_fast import _C
from rcmstr_fast.config import ConfigError
from rcmstr_fast.data import lmdb_read
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.source import open_sources
from tests.data.pictures import lay, picture


def records(start: int, count: int) -> list[tuple[bytes, str | None]]:
    labels = [None, "", "[Unlabeled_data]", "Wörd", "two words"]
    return [(b"picture%d" % i, labels[i % 5]) for i in range(start, start + count)]


@pytest.fixture
def tree(tmp_path) -> Path:
    write_lmdb(tmp_path / "one", records(0, 10))
    write_lmdb(tmp_path / "many" / "MJ" / "train", records(100, 7))
    write_lmdb(tmp_path / "many" / "ST", records(200, 5))
    folder = tmp_path / "pictures"
    for name in ("b/2.JPG", "a.png", "c.jpeg", "deep/er/x.tiff", "notes.txt", "z.GIF"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    (folder / "labels.tsv").write_text("\ufeffa.png\tA\tb\nb/2.JPG\t[Unlabeled_data]\r\nz.GIF\tü\n\n", "utf-8")
    return tmp_path


def test_one_flat_list(tree):
    source = open_sources([str(tree / "one"), str(tree / "many"), tree / "pictures"])
    assert len(source) == 27
    assert source.sizes == [10, 12, 5]
    assert [found.name for found in source.sets] == ["one", "MJ/train", "ST", "pictures"]
    assert source.root_names == [str(tree / name) for name in ("one", "many", "pictures")]
    assert source.name(0) == f"{tree}/one/data.mdb:image-000000001"
    assert source.name(17) == f"{tree}/many/ST/data.mdb:image-000000001"
    assert source.name(23) == f"{tree}/pictures/b/2.JPG"
    order = [26, 0, 9, 10, 16, 17, 21, 22, 0]
    expected = [
        b"z.GIF",
        b"picture0",
        b"picture9",
        b"picture100",
        b"picture106",
        b"picture200",
        b"picture204",
        b"a.png",
    ]
    assert source.read(order) == [*expected, b"picture0"]
    assert source.read(np.asarray(order)) == source.read(order)
    assert source.read([]) == []
    assert source.labels([0, 1, 2, 3, 4]) == [None, None, None, "Wörd", "two words"]
    assert source.labels(range(22, 27)) == ["A\tb", None, None, None, "ü"]
    for wrong in ([-1], [27]):
        with pytest.raises(IndexError, match="records are 0 to 26"):
            source.read(wrong)


def test_the_data_file_itself_and_the_same_root_twice(tree):
    source = open_sources([tree / "one" / "data.mdb", tree / "one"])
    assert source.sizes == [10, 10]
    assert source.sets[0].name == "one"
    assert source.read([0, 10]) == [b"picture0"] * 2


def test_symbolic_links_are_followed_once(tree):
    os.symlink(tree / "many", tree / "many" / "loop")
    linked = tree / "linked"
    linked.mkdir()
    os.symlink(tree / "one", linked / "one")
    assert len(open_sources([tree / "many"])) == 12
    assert open_sources([linked]).read([3]) == [b"picture3"]


def test_hidden_files_and_folders_do_not_count(tree):
    (tree / "many" / ".ST.partial-1").mkdir()
    (tree / "many" / ".ST.partial-1" / "data.mdb").write_bytes(b"half written")
    (tree / "pictures" / "._a.png").write_bytes(b"resource fork")
    assert open_sources([tree / "many", tree / "pictures"]).sizes == [12, 5]


def read_in_child(source, method):
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        assert pool.submit(source.read, [0, 1]).result(60) == [b"picture0", b"picture1"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_open_for_themselves(tree, method):
    source = open_sources([tree / "one"])
    assert source.read([0]) == [b"picture0"]
    assert len(pickle.dumps(source)) < 2000
    read_in_child(source, method)


def change(folder: Path, **entries: bytes | None) -> None:
    with lmdb.open(str(folder)) as env, env.begin(write=True) as txn:
        for key, value in entries.items():
            name = key.replace("_", "-").encode()
            txn.delete(name) if value is None else txn.put(name, value)


def test_missing_records_are_none(tree, caplog):
    change(tree / "one", num_samples=b"12", image_000000004=None, label_000000005=b"\xff\xfe")
    source = open_sources([tree / "one"])
    assert [i for i, value in enumerate(source.read(range(12))) if value is None] == [3, 10, 11]
    with caplog.at_level(logging.WARNING):
        assert source.labels([4]) == [None]
    assert "1 labels are not UTF-8" in caplog.text and "image-000000005" in caplog.text
    assert source.raw_labels([4]) == [b"\xff\xfe"]


def test_num_samples_beyond_the_keys_is_told(tree, caplog):
    change(tree / "one", num_samples=b"100")
    assert len(open_sources([tree / "one"])) == 100
    assert "num-samples is b'100', and 10 pictures are there" in caplog.text
    assert "90 pictures missing, 0 pictures not reached" in caplog.text


def test_a_sparse_file_as_large_as_its_map_is_read_like_any_other(tree):
    """LMDB on Windows leaves a file of the whole map size, here a terabyte of which nothing is written."""
    expected = open_sources([tree / "one"]).read(range(10))
    os.truncate(tree / "one" / "data.mdb", 1 << 40)
    source = open_sources([tree / "one"])
    assert source.read(range(10)) == expected and source.labels([3]) == ["Wörd"]


def test_a_database_of_labels_alone_and_one_that_was_never_written(tree):
    """MMOCR 0.x keeps JSON lines under plain numbers; a copy that failed leaves a file of no bytes."""
    with lmdb.open(str(tree / "mmocr"), map_size=1 << 20) as env, env.begin(write=True) as txn:
        txn.put(b"0", b'{"filename": "0.jpg", "text": "abc"}')
        txn.put(b"total_number", b"1")
    with pytest.raises(ConfigError, match=r"expected keys image-000000001, .. in .*, got 2 keys such as b'0'"):
        open_sources([tree / "mmocr"])
    (tree / "many" / "empty").mkdir()
    (tree / "many" / "empty" / "data.mdb").touch()
    with pytest.raises(ConfigError, match=r"many/empty/data\.mdb: not an LMDB data file"):
        open_sources([tree / "many"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({f"image_{i:09d}": None for i in range(1, 11)}, "keys image-000000001, .. in .*, got 9 keys such as b'label-"),
        ({f"image_{i:09d}": None for i in range(1, 11)} | {"image_x": b"x"}, "got 10 keys such as b'image-x'"),
    ],
)
def test_unusable_databases(tree, entries, message):
    change(tree / "one", **entries)
    with pytest.raises(ConfigError, match=message):
        open_sources([tree / "one"])


@pytest.mark.parametrize("text", [None, b"0", b"-3", b"ten", b"9" * 9000])
def test_without_a_usable_num_samples_the_pictures_are_counted(tree, text, caplog):
    change(tree / "one", num_samples=text)
    source = open_sources([tree / "one"])
    assert len(source) == 10 and source.read([0, 9]) == [b"picture0", b"picture9"]
    (told,) = [record.getMessage() for record in caplog.records]
    assert "10 pictures are there" in told and ("no num-samples" in told) == (text is None)


def write_keys(folder: Path, numbers, form: str, num: int | None) -> None:
    with lmdb.open(str(folder), map_size=1 << 24) as env, env.begin(write=True) as txn:
        for i in numbers:
            txn.put(("image-" + form % i).encode(), b"p%d" % i)
            txn.put(("label-" + form % i).encode(), b"w%d" % i)
        if num is not None:
            txn.put(b"num-samples", b"%d" % num)


@pytest.mark.parametrize(
    ("numbers", "form", "num", "read", "said"),
    [
        (range(1, 41), "%09d", 40, range(1, 41), None),
        (range(1, 41), "%09d", 10, range(1, 11), "30 pictures not reached"),
        (range(1, 41), "%09d", None, range(1, 41), "no num-samples, and 40 pictures are there"),
        (range(1, 41), "%08d", 40, range(1, 41), "image-00000001 to image-00000040"),
        (range(1, 41), "%d", 40, range(1, 41), "image-1 to image-40"),
        (range(1, 41), "%d", None, range(1, 41), "image-1 to image-40"),
        (range(40), "%09d", 40, range(40), "image-000000000 to image-000000039"),
        (range(41), "%09d", 40, range(1, 41), "1 pictures not reached"),
        (range(40), "%d", None, range(40), "0 pictures not reached"),
        (range(101, 141), "%09d", 40, range(101, 141), "image-000000101 to image-000000140"),
        ([1, 2, 4, 5], "%09d", 5, [1, 2, 4, 5], None),
        ([1, 2, 4, 5], "%09d", 6, [1, 2, 4, 5], "2 pictures missing"),
    ],
)
def test_other_numbers_and_paddings_are_read_and_said_in_one_line(tmp_path, numbers, form, num, read, said, caplog):
    write_keys(tmp_path, numbers, form, num)
    source = open_sources([tmp_path])
    found = [data for data in source.read(range(len(source))) if data is not None]
    assert found == [b"p%d" % i for i in read]
    assert [label for label in source.labels(range(len(source))) if label] == [f"w{i}" for i in read]
    source.prefetch(range(len(source)))
    lines = [record.getMessage() for record in caplog.records]
    assert (lines == []) if said is None else (len(lines) == 1 and said in lines[0])
    for i, data in enumerate(source.read(range(len(source)))):
        assert data is None or source.name(i).endswith(":image-" + form % int(data[1:]))


def test_data_files_of_other_names_are_found(tree):
    (tree / "files").mkdir()
    os.rename(tree / "one" / "data.mdb", tree / "files" / "train.lmdb")
    (tree / "files" / "lock.mdb").write_bytes(b"")
    source = open_sources([tree / "files"])
    assert len(source) == 10 and source.sets[0].name == "train.lmdb"
    assert len(open_sources([tree / "files" / "train.lmdb"])) == 10


def test_pictures_beside_databases_are_counted(tree, caplog):
    (tree / "many" / "loose").mkdir()
    for name in ("a.png", "b.jpg"):
        (tree / "many" / "loose" / name).write_bytes(b"x")
    assert len(open_sources([tree / "many"])) == 12
    assert "2 pictures beside the LMDBs are not read, such as loose/a.png" in caplog.text


def test_lists_in_folders_below_are_told(tree, caplog):
    os.rename(tree / "pictures" / "labels.tsv", tree / "pictures" / "b" / "labels.tsv")
    assert open_sources([tree / "pictures"]).labels([0]) == [None]
    assert "1 lists of labels in folders below are not read, such as b/labels.tsv" in caplog.text


def test_names_are_bytes(tree):
    """Neither the folder, nor a data file, nor a picture, nor the list need be UTF-8."""
    folder = os.fsdecode(os.fsencode(tree) + b"/\xff\xfe")
    os.rename(tree / "one", folder)
    source = open_sources([folder])
    assert source.read([1]) == [b"picture1"]
    pictures = os.fsencode(tree) + b"/p\xe9"
    os.mkdir(pictures)
    for name in (b"\xe9.png", "ü.png".encode()):
        with open(pictures + b"/" + name, "wb") as file:
            file.write(name)
    with open(pictures + b"/labels.tsv", "wb") as file:
        file.write(b"\xe9.png\tone\n" + "ü.png\tzwei\n".encode())
    source = open_sources([os.fsdecode(pictures)])
    assert sorted(zip(source.read([0, 1]), source.labels([0, 1]))) == [("ü.png".encode(), "zwei"), (b"\xe9.png", "one")]


def test_unusable_roots(tree):
    (tree / "empty").mkdir()
    (tree / "other").mkdir()
    (tree / "other" / "data.mdb").write_bytes(b"no" * 5000)
    (tree / "words.zip").touch()
    cases = {
        tree / "nowhere": "which does not exist",
        tree / "empty": r"expected an LMDB \(data.mdb\) or images \(.jpg .*found neither",
        tree / "other": "expected an LMDB data file at .*other/data.mdb: not an LMDB",
        tree / "words.zip": "`rcmstr data convert .*words.zip FOLDER` makes an LMDB of it",
        tree / "pictures" / "a.png": "expected an LMDB data file at .*a.png",
    }
    for root, message in cases.items():
        with pytest.raises(ConfigError, match=message) as error:
            open_sources([root])
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="at least one data root"):
        open_sources([])


def test_wrong_labels_file(tree, caplog):
    labels = tree / "pictures" / "labels.tsv"
    labels.write_text("a.png\tA\nnothing\na.png\tB\ngone.png\tx\n")
    assert open_sources([tree / "pictures"]).labels([0]) == ["A"]
    for said in (
        "1 of 4 lines count",
        "1 lines not of the form tsv, such as labels.tsv, line 2: 'nothing'",
        "1 lines listed twice with another label",
        "1 lines file missing, such as gone.png",
    ):
        assert said in caplog.text
    labels.write_bytes(b"a.png\t\xff\n")
    assert open_sources([tree / "pictures"]).labels([0]) == [None]
    assert "1 labels are not UTF-8" in caplog.text


def test_prefetching_changes_nothing_that_is_read(tree):
    for roots in ([tree / "one"], [tree / "one", tree / "many", tree / "pictures"]):
        source = open_sources(roots)
        source.prefetch(range(len(source)))
        assert source.read(range(len(source))) == open_sources(roots).read(np.arange(len(source)))
        for action in (source.prefetch, source.read):
            with pytest.raises(IndexError, match=f"records are 0 to {len(source) - 1}"):
                action([0, len(source)])


def test_vanished_file_is_none(tree):
    source = open_sources([tree / "pictures"])
    (tree / "pictures" / "a.png").unlink()
    assert source.read([0, 1]) == [None, b"b/2.JPG"]


def test_pipes_devices_and_endless_files_are_none(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    with open(tmp_path / "d.png", "wb") as sparse:
        sparse.truncate(1 << 40)
    assert open_sources([tmp_path]).read(range(4)) == [b"picture", None, None, None]


@pytest.fixture(params=["unsupported", "missing"])
def without_compiled_reader(request, monkeypatch):
    if request.param == "missing":
        import rcmstr_fast

        monkeypatch.setitem(__import__("sys").modules, "rcmstr_fast._C", None)
        monkeypatch.delattr(rcmstr_fast, "_C")
        return

    def refuse(path):
        raise _C.LmdbUnsupported("LMDB format version 7, expected 1")

    monkeypatch.setattr(_C, "LmdbReader", refuse)


def test_the_lmdb_package_gives_the_same(tree, without_compiled_reader, caplog):
    roots = [tree / "one", tree / "many", tree / "one"]
    source = open_sources(roots)
    assert all(isinstance(found._file._reader(), lmdb_read._PackageReader) for found in source.sets)
    told = [record for record in caplog.records if "is read with the lmdb package" in record.getMessage()]
    assert len(told) == 3  # once a file, also for the one given twice
    source.prefetch(range(32))
    everything = source.read(range(32)), source.labels(range(32))
    assert everything[0][:2] == [b"picture0", b"picture1"] and everything[1][3:5] == ["Wörd", "two words"]
    assert source.read([0]) == source.read([22])
    read_in_child(source, "fork")
    with pytest.raises(ConfigError, match="expected an LMDB data file at"):
        open_sources([tree / "pictures" / "a.png"])


def cut(folder: Path, share: float) -> None:
    content = (folder / "data.mdb").read_bytes()
    (folder / "data.mdb").write_bytes(content[: int(share * len(content))])


@pytest.mark.parametrize("labels", [True, False])
def test_a_truncated_file_has_as_many_records_as_its_writer_counted(tmp_path, labels, caplog):
    write_lmdb(tmp_path, ((b"%d" % i * 300, f"w{i}" if labels else None) for i in range(300)))
    cut(tmp_path, 0.6)
    source = open_sources([tmp_path])
    assert len(source) == 300
    (told,) = [record.getMessage() for record in caplog.records]
    assert "is damaged or a part of a copy" in told
    found = [i for i, data in enumerate(source.read(range(300))) if data is not None]
    assert 150 < len(found) < 210 and source.read(found) == [b"%d" % i * 300 for i in found]
    assert source.labels(found) == [f"w{i}" if labels else None for i in found]
    again = pickle.loads(pickle.dumps(source))
    assert again.read(range(300)) == source.read(range(300)) and len(caplog.records) == 1


def test_the_lmdb_package_refuses_a_truncated_file(tmp_path, without_compiled_reader):
    write_lmdb(tmp_path, ((b"%d" % i * 300, None) for i in range(300)))
    pages = (tmp_path / "data.mdb").stat().st_size // 4096
    cut(tmp_path, 0.6)
    with pytest.raises(ConfigError, match=rf"got \d+ of {pages} pages; a truncated file needs the compiled reader"):
        open_sources([tmp_path])


def test_write_lmdb_refuses_to_overwrite_and_grows(tmp_path, monkeypatch):
    monkeypatch.setattr("rcmstr_fast.data.lmdb_writer._FIRST_MAP_SIZE", 1 << 16)
    assert write_lmdb(tmp_path / "new", ((b"x" * 3000, None) for _ in range(2500))) == 2500
    source = open_sources([tmp_path / "new"])
    assert len(source) == 2500 and source.read([2499]) == [b"x" * 3000]
    with pytest.raises(ConfigError, match=r"got .*new with a data\.mdb"):
        write_lmdb(tmp_path / "new", [])


@pytest.mark.parametrize("texts", [True, False])
def test_masks_are_no_pictures_of_words(tmp_path, texts):
    """A folder of `rcmstr segment`, read for its words."""
    columns = [f"images/{i}.png\tmasks/{i}.png" + (f"\tword {i}" if texts else "") for i in range(3)]
    files = {f"{kind}/{i}.png": picture(i) for i in range(3) for kind in ("images", "masks")}
    source = open_sources([lay(tmp_path / "in", files | {"pairs.tsv": "\n".join(columns) + "\n"})])
    assert [Path(source.name(i)).parts[-2] for i in range(len(source))] == ["images"] * 3
    assert source.labels(range(3)) == ([f"word {i}" for i in range(3)] if texts else [None] * 3)
