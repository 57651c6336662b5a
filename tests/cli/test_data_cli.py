import json
import shutil
from pathlib import Path

import pytest

from rcmstr_fast.cli.main import main

pytest.importorskip("fontTools", reason="the synth extra is not installed")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("cli")
    (tmp_path / "words.txt").write_text("street\nmarket\n")
    (tmp_path / "recipe.yaml").write_text(f"words: {tmp_path / 'words.txt'}\ncount: 99\neffects:\n  noise: 1.0\n")
    out = str(tmp_path / "set")
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--out", out, "--count", "6", "--effects.blur", "0"]
    assert main(["data", "synth", *arguments, "--processes", "1"]) == 0
    return tmp_path / "set"


@pytest.fixture
def rendered(once, tmp_path):
    return Path(shutil.copytree(once, tmp_path / "set"))


def test_synth_takes_a_recipe_and_flags_win(rendered, capsys):
    request = json.loads((rendered / "synth.json").read_text())
    assert request["count"] == 6 and request["effects"]["noise"] == 1.0 and request["effects"]["blur"] == 0.0
    assert (rendered / "samples.png").exists()


def test_check_is_quiet_about_sound_data(rendered, capsys):
    assert main(["data", "check", str(rendered)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "6 images, 0 broken"


def test_check_names_broken_records_and_fails(rendered, capsys):
    import lmdb

    with lmdb.open(str(rendered)) as database, database.begin(write=True) as transaction:
        transaction.put(b"image-000000004", b"junk")
    assert main(["data", "check", str(rendered)]) == 1
    out = capsys.readouterr().out
    assert "image-000000004: not a picture (4 bytes)" in out and "6 images, 1 broken" in out
    assert main(["data", "check", str(rendered), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["total"] == 6 and len(report["broken"]) == 1


def test_stats_as_text_and_json(rendered, capsys):
    assert main(["data", "stats", str(rendered)]) == 0
    assert "set: 6 images, 0.0% unlabelled" in capsys.readouterr().out
    assert main(["data", "stats", str(rendered), "--json", "--charset", "36"]) == 0
    (stats,) = json.loads(capsys.readouterr().out)
    assert stats["images"] == 6 and set(stats["inside"]) == {"36", "62", "94"}


def test_convert_says_what_it_left_out(rendered, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes((rendered / "samples.png").read_bytes())
    (folder / "labels.tsv").write_text("a.png\tStreet\n" + "".join(f"b{i}.png\tx\n" for i in range(12)))
    assert main(["data", "convert", str(folder), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "1 of 13 images, 0 of them without a label" in out
    assert "left out, file missing: 12" in out and "and 2 more" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "subcommand"),
        (["sinth"], "sinth"),
        (["synth", "--cuont", "3"], "did you mean count"),
        (["synth", "--count", "many"], "count: expected int, got many"),
        (["synth", "--words", "absent.txt"], "words must be a text file"),
        (["convert", "absent", "out"], "does not exist"),
        (["check", "absent"], "does not exist"),
        (["check"], "roots"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_help_shows_every_field_with_meaning_and_default(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["data", "synth", "--help"])
    assert ended.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "lowest height of a crop in pixels; at least 16 and at most 256. (type: int, default: 32)" in out
    assert (
        "--effects.curve CURVE the word bent along an arc; at least 0 and at most 1. (type: float, default: 0.15)"
        in out
    )
