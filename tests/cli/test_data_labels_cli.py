"""`rcmstr data check|convert|stats` on other people's lists, faulty labels and names that are not UTF-8."""

import json
import os
import subprocess
import sys

from rcmstr_fast.cli.main import main
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.source import open_sources
from tests.data.pictures import lay, picture


def gbk_set(folder):
    import lmdb

    write_lmdb(folder, [(picture(i), "x") for i in range(14)])
    with lmdb.open(str(folder)) as env, env.begin(write=True) as txn:
        for i in range(1, 13):
            txn.put(b"label-%09d" % i, f"京A{i}".encode("gb18030"))
        txn.put(b"label-000000013", b"abc \n")
    return str(folder)


def test_check_looks_at_labels_and_convert_mends_them(tmp_path, capsys):
    root = gbk_set(tmp_path / "set")
    assert main(["data", "check", root]) == 1
    out = capsys.readouterr().out
    assert "labels with the fault 'not UTF-8' (they look like gb18030): 12" in out and "  and 2 more" in out
    assert f"to mend labels: rcmstr data convert {root} OUT --mend" in out
    assert out.splitlines()[-1].startswith("14 images, 0 broken, 12 labels: not UTF-8, 1 labels: a line end")
    assert main(["data", "check", root, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["labels"]["not UTF-8"]["count"] == 12 and report["labelled"] == 14 and report["broken"] == []
    assert main(["data", "convert", root, str(tmp_path / "plain")]) == 0
    out = capsys.readouterr().out
    assert "2 of 14 images" in out and "left out, label not UTF-8 (--mend mends it): 12" in out
    assert "labels with a line end: 1 (--mend mends them)" in out
    assert main(["data", "convert", root, str(tmp_path / "out"), "--mend"]) == 0
    assert "labels with not UTF-8: 12, mended" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "out")]) == 0
    assert open_sources([tmp_path / "out"]).labels([0, 12]) == ["京A1", "abc"]


def test_convert_says_what_it_took_a_list_for_and_obeys(tmp_path, capsys, caplog):
    folder = lay(tmp_path / "in", {"1.png": picture(1), "labels.csv": "filename,words\n1.png,one\n"})
    with caplog.at_level("INFO"):
        assert main(["data", "convert", str(folder), str(tmp_path / "out")]) == 0
    assert "labels.csv taken for csv: a table with a header (EasyOCR labels.csv" in caplog.text
    assert main(["data", "convert", str(folder), str(tmp_path / "b"), "--format", "icdar"]) == 0
    assert "left out, file missing: 1\n  filename" in capsys.readouterr().out
    assert main(["data", "convert", str(folder), str(tmp_path / "c"), "--format", "excel"]) == 2
    assert "format must be one of" in capsys.readouterr().err
    assert main(["data", "convert", str(folder), str(tmp_path / "d"), "--lists", "labels.csv", "--split", "none"]) == 0


def test_parts_are_shown(tmp_path, capsys):
    files = {
        f"{part}set/words/1/000{i}-1-0-0-word.tif": picture(i, format="TIFF")
        for i, part in enumerate(("train", "test"))
    }
    assert main(["data", "convert", str(lay(tmp_path / "in", files)), str(tmp_path / "out")]) == 0
    assert "2 of 2 images, 0 of them without a label\n  test: 1\n  train: 1\n" in capsys.readouterr().out


def test_names_that_are_not_utf8(tmp_path):
    """As a process, whose streams are those of a terminal: every command works, or ends with one line."""
    base = os.fsencode(tmp_path) + b"/"
    os.mkdir(base + b"in\xff")
    for name, data in {
        b"a\xe9.png": picture(1),
        b"b\xe9.png": b"broken",
        b"labels.tsv": b"a\xe9.png\tone\nb\xe9.png\ttwo\n",
    }.items():
        with open(base + b"in\xff/" + name, "wb") as file:
            file.write(data)

    def rcmstr(*arguments):
        command = [sys.executable, "-m", "rcmstr_fast.cli.main", "data", *arguments]
        return subprocess.run(command, capture_output=True, timeout=120, check=False)

    done = rcmstr("check", base + b"in\xff")
    assert done.returncode == 1 and base + b"in\xff/b\xe9.png: not a picture (6 bytes)" in done.stdout
    done = rcmstr("convert", base + b"in\xff", base + b"out\xfe")
    assert done.returncode == 0 and b"out\xfe: 1 of 2 images" in done.stdout and b"Traceback" not in done.stderr
    done = rcmstr("stats", base + b"out\xfe", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)[0]["images"] == 1
    done = rcmstr("check", base + b"gone\xfe")
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"does not exist" in done.stderr
