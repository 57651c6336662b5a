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
    assert "image-000000005: its label is not UTF-8" in caplog.text


def test_num_samples_beyond_the_keys_is_told(tree, caplog):
    change(tree / "one", num_samples=b"100")
    assert len(open_sources([tree / "one"])) == 100
    assert "num-samples is 100, but there are 19 keys" in caplog.text


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_samples": None}, "expected the key num-samples in .*data.mdb, got 18 keys without it"),
        ({"num_samples": b"0"}, "num-samples of 1 or more in .*, got b'0'"),
        ({"num_samples": b"-3"}, "got b'-3'"),
        ({"num_samples": b"ten"}, "got b'ten'"),
        ({"num_samples": b"9" * 9000}, "got b'9{30}'"),
        ({f"image_{i:09d}": None for i in range(1, 11)}, "expected keys image-000000001, .. in .*, got none"),
    ],
)
def test_unusable_databases(tree, entries, message):
    change(tree / "one", **entries)
    with pytest.raises(ConfigError, match=message):
        open_sources([tree / "one"])


def test_unusable_roots(tree):
    (tree / "empty").mkdir()
    (tree / "other").mkdir()
    (tree / "other" / "data.mdb").write_bytes(b"no" * 5000)
    cases = {
        tree / "nowhere": "which does not exist",
        tree / "empty": r"expected an LMDB \(data.mdb\) or images \(.jpg .*found neither",
        tree / "other": "expected an LMDB data file at .*other/data.mdb: not an LMDB",
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
    labels.write_text("a.png A\n")
    with pytest.raises(ConfigError, match=r"labels.tsv line 1, got 'a.png A'"):
        open_sources([tree / "pictures"]).labels([0])
    labels.write_bytes(b"a.png\t\xff\n")
    with pytest.raises(ConfigError, match="expected UTF-8"):
        open_sources([tree / "pictures"]).labels([0])
    labels.write_text("gone.png\tx\na.png\ty\n")
    assert open_sources([tree / "pictures"]).labels([0, 1]) == ["y", None]
    assert "lists 1 files that are not there, such as gone.png" in caplog.text


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
