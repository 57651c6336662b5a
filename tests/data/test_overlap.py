"""Pictures in common, by content; the cache of hashes; files that are given twice."""

import os
import shutil

import numpy as np
import pytest

from rcmstr_fast.cli.main import main
from rcmstr_fast.data import overlap as module
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.overlap import NOTHING, content_hashes, files_given_twice, find_overlap
from rcmstr_fast.data.source import open_sources
from tests.data.pictures import lay, picture


@pytest.fixture
def sets(tmp_path):
    write_lmdb(tmp_path / "a", [(picture(i), f"a{i}") for i in range(20)])
    write_lmdb(tmp_path / "b", [(picture(i), f"b{i}") for i in range(15, 30)] + [(b"", "empty")])
    lay(tmp_path / "c", {f"{i}.png": picture(i) for i in (3, 29, 40)} | {"again.png": picture(40), "empty.png": b""})
    return {name: open_sources([tmp_path / name]) for name in "abc"}


def test_overlap_is_what_a_comparison_of_bytes_finds(sets):
    report = find_overlap(sets)
    contents = {name: source.read(range(len(source))) for name, source in sets.items()}
    for pair in report.pairs:
        shared = [data for data in contents[pair.other] if data and data in contents[pair.one]]
        assert (pair.count, pair.total) == (len(shared), len(contents[pair.other]))
    assert [(pair.one, pair.other, pair.count) for pair in report.pairs] == [
        ("a", "b", 5),
        ("a", "c", 1),
        ("b", "c", 1),
    ]
    assert report.repeated == {"c": 1}
    name, twin = report.pairs[0].examples[0]
    assert name.endswith("b/data.mdb:image-000000001") and twin.endswith("a/data.mdb:image-000000016")
    assert "5 of 16 pictures of b are in a, such as" in str(report)
    assert find_overlap(sets, between=[("b", "c")]).pairs == report.pairs[2:]


def test_parts_of_a_set(sets):
    records = {"a": np.array([0, 15, 16]), "b": np.array([0, 3, 15])}
    (pair,) = find_overlap({name: sets[name] for name in "ab"}, records).pairs
    assert (pair.count, pair.total) == (1, 3)
    both = find_overlap({"x": sets["a"], "y": sets["a"]}, {"x": np.arange(5), "y": np.arange(5, 20)})
    assert both.pairs == [] and both.repeated == {}


def test_hashes_are_of_the_content_and_kept(sets, tmp_path, monkeypatch):
    first = {name: content_hashes(source) for name, source in sets.items()}
    assert (first["a"][15:] == first["b"][:5]).all() and len(set(first["a"])) == 20
    assert first["b"][15] == first["c"][list(sets["c"].read(range(5))).index(b"")] == NOTHING
    with monkeypatch.context() as patch:
        patch.setattr(module, "_hash", lambda data: 1 / 0)
        again = {name: content_hashes(open_sources([tmp_path / name])) for name in "abc"}
        assert all((again[name] == first[name]).all() for name in "abc")
        (tmp_path / "c" / "3.png").write_bytes(picture(99))
        with pytest.raises(ZeroDivisionError):
            content_hashes(open_sources([tmp_path / "c"]))
    assert content_hashes(open_sources([tmp_path / "c"]))[1] != first["c"][1]


def test_only_what_is_asked_for_is_read(sets, monkeypatch):
    asked = []
    real = module._hash
    monkeypatch.setattr(module, "_hash", lambda data: asked.append(data) or real(data))
    some = content_hashes(sets["a"], np.array([4, 2]))
    assert len(asked) == 2
    assert (content_hashes(sets["a"])[[4, 2]] == some).all() and len(asked) == 20


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", None])
def test_a_damaged_or_unwritable_cache_costs_time_only(sets, damage, tmp_path, monkeypatch):
    expected = content_hashes(sets["a"])
    if damage is None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("RCMSTR_FAST_CACHE", str(tmp_path / "file"))
    else:
        module._cache_file(sets["a"].sets[0]).write_bytes(damage)
    assert (content_hashes(sets["a"]) == expected).all()


def test_files_that_are_given_twice(tmp_path, sets):
    (tmp_path / "root").mkdir()
    shutil.move(tmp_path / "a", tmp_path / "root" / "a")
    shutil.move(tmp_path / "b", tmp_path / "root" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "root" / "b")
    os.link(tmp_path / "c" / "3.png", tmp_path / "c" / "hard.png")

    def lines(*roots):
        return files_given_twice(open_sources([tmp_path / root for root in roots]))

    assert lines("root") == []
    assert len(lines("root", "root")) == 2
    (line,) = lines("root", "root/a")
    assert line.startswith("20 pictures are given twice, in ")
    (line,) = lines("root", "link")
    assert line.startswith("16 pictures")
    (line,) = lines("c")
    assert line.startswith("1 pictures") and "hard.png is " in line
    (line,) = lines("root", "root/a/data.mdb")
    assert line.startswith("20 pictures")


def test_the_command(sets, tmp_path, capsys):
    roots = [str(tmp_path / name) for name in "ab"]
    assert main(["data", "overlap", *roots]) == 1
    out = capsys.readouterr().out
    assert f"5 of 16 pictures of {roots[1]} are in {roots[0]}" in out
    assert main(["data", "overlap", roots[0], roots[0]]) == 1
    assert "20 of 20 pictures" in capsys.readouterr().out
    assert main(["data", "overlap", roots[0]]) == 0
    assert main(["data", "overlap", roots[1], "--json"]) == 0
