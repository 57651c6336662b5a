import io

import numpy as np
import pytest
from PIL import Image

from rcmstr_fast.charset import Charset
from rcmstr_fast.cli.main import main
from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.check import check, set_stats, stats_table
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.source import open_sources


def picture(height: int, width: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(data, "JPEG")
    return data.getvalue()


def test_every_broken_record_is_named_in_order(tmp_path):
    good = picture(16, 40)
    records = [(good, "a")] * 1200
    broken = {3: b"", 511: b"no picture", 512: good[: len(good) // 2], 700: picture(1, 9), 1199: picture(200, 200)}
    for place, data in broken.items():
        records[place] = (data, "b")
    write_lmdb(tmp_path / "set", records)
    source = open_sources([str(tmp_path)])
    for threads in (1, 3):
        report = check(source, max_pixels=30_000, min_side=2, threads=threads)
        assert report.total == 1200
        assert [name for name, _ in report.broken] == [source.name(i) for i in broken]
    reasons = [reason for _, reason in report.broken]
    assert "min_side" in reasons[3] and "max_pixels" in reasons[4] and all(reasons)


def test_a_missing_key_is_broken(tmp_path):
    import lmdb

    write_lmdb(tmp_path / "set", [(picture(8, 8), "a")] * 3)
    with lmdb.open(str(tmp_path / "set")) as database, database.begin(write=True) as transaction:
        transaction.delete(b"image-000000002")
    report = check(open_sources([str(tmp_path)]), max_pixels=10**6, min_side=2)
    assert len(report.broken) == 1 and report.broken[0][0].endswith("image-000000002")


def test_a_truncated_file_has_the_lost_records_named(tmp_path):
    write_lmdb(tmp_path / "set", [(picture(40, 80), "a")] * 200)
    file = tmp_path / "set" / "data.mdb"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 6 // 10])
    source = open_sources([str(tmp_path)])
    report = check(source, max_pixels=10**6, min_side=2)
    lost = [i for i, data in enumerate(source.read(range(200))) if data is None]
    assert report.total == 200 and 40 < len(lost) < 120
    assert report.broken == [(source.name(i), "missing or unreadable record") for i in lost]


def test_sound_data_has_nothing_to_report(tmp_path):
    write_lmdb(tmp_path / "set", [(picture(8, 30), "a")] * 5)
    assert check(open_sources([str(tmp_path)]), max_pixels=10**6, min_side=2).broken == []


def test_statistics_are_those_of_the_set(tmp_path):
    records = [
        (picture(10, width), label) for width, label in zip(range(10, 60, 10), ["ab", "AB!", "\u4e2d", None, "a"])
    ]
    write_lmdb(tmp_path / "set", [*records, (b"junk", None)])
    stats = set_stats(open_sources([str(tmp_path)]).sets[0], "36")
    assert (stats.images, stats.unreadable, stats.characters) == (6, 1, 6)
    assert stats.unlabelled == pytest.approx(2 / 6)
    assert (stats.width["0%"], stats.width["50%"], stats.width["100%"]) == (10, 30, 50)
    assert stats.height["5%"] == 10 and stats.aspect["100%"] == 5
    assert stats.label_length == {1: 2, 2: 1, 3: 1}
    assert stats.inside == {"36": 0.5, "62": 0.5, "94": 0.75}
    assert stats.outside == {"A": 1, "B": 1, "!": 1, "\u4e2d": 1}
    table = stats_table([stats])
    assert "set: 6 images, 33.3% unlabelled, 1 unreadable" in table and "50% 30" in table


def test_the_characters_of_a_set_are_a_charset_file(tmp_path, capsys):
    write_lmdb(tmp_path / "set", [(picture(10, 10), label) for label in ("b a", "ba", "\u4e2d\r", None)])
    path = tmp_path / "characters.txt"
    assert main(["data", "stats", str(tmp_path / "set"), "--characters", str(path)]) == 0
    assert path.read_text(encoding="utf-8").split("\n") == ["a", "b", " ", "\u4e2d", ""]
    assert Charset.load(str(path)).characters == ("a", "b", " ", "\u4e2d")
    lower = ["--characters", str(path), "--protocol", "fewer_labels36"]
    write_lmdb(tmp_path / "capitals", [(picture(10, 10), "AB!")])
    assert main(["data", "stats", str(tmp_path / "capitals"), *lower]) == 0
    assert path.read_text(encoding="utf-8").split() == ["a", "b"]
    assert main(["data", "stats", str(tmp_path / "set"), "--characters", str(tmp_path / "no/x")]) == 2
    assert "characters must name a file" in capsys.readouterr().err
    write_lmdb(tmp_path / "bare", [(picture(10, 10), None)])
    assert main(["data", "stats", str(tmp_path / "bare"), "--characters", str(path)]) == 2


def test_a_set_without_labels_or_sizes(tmp_path):
    write_lmdb(tmp_path / "set", [(b"junk", None)] * 2)
    stats = set_stats(open_sources([str(tmp_path)]).sets[0])
    assert stats.unlabelled == 1 and stats.width == {} and stats.inside == {}
    assert "2 unreadable" in stats_table([stats])


def test_unknown_charset(tmp_path):
    write_lmdb(tmp_path / "set", [(b"junk", None)])
    with pytest.raises(ConfigError, match="charset must be"):
        set_stats(open_sources([str(tmp_path)]).sets[0], "nonsense")
