"""`rcmstr tune` and `rcmstr doctor --check`: what they print and what they refuse."""

import json

import pytest

from rcmstr_fast.cli import doctor, tune
from rcmstr_fast.cli.arguments import with_files
from rcmstr_fast.cli.main import main
from rcmstr_fast.ops import dispatch, selfcheck
from rcmstr_fast.timer import Times
from rcmstr_fast.tuning.engine import Outcome
from tests.tuning.faults import planted

RECIPE = ["--config", "tiny_cnn_rcmstr"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "masked.stage"], "got masked.stage; did you mean masked.stages?"),
        (["--only", "xyz"], "only: expected one of cpu.threads, "),
        (["--seconds", "0"], "seconds must be more than 0, got 0"),
        (["--train.tune", "maybe"], "train.tune: expected one of 'auto', 'on', 'off', got maybe"),
        (["--config", "tiny_cnn_rcmst"], "tiny_cnn_rcmst"),
    ],
)
def test_bad_input_is_one_line(capsys, words, says):
    assert main(["tune", *RECIPE, *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_recipes_are_found_by_name(tmp_path, monkeypatch):
    words = with_files(["--config", "tiny_cnn_rcmstr", "--config=tiny_vit_rcmstr.yaml", "--run", "tiny_cnn_rcmstr"])
    assert words[1].endswith("recipes/tiny_cnn_rcmstr.yaml") and words[2].endswith("recipes/tiny_vit_rcmstr.yaml")
    assert words[3:] == ["--run", "tiny_cnn_rcmstr"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_cnn_rcmstr").write_text("{}")
    assert with_files(["--config", "tiny_cnn_rcmstr"]) == ["--config", "tiny_cnn_rcmstr"]


def test_the_table_names_candidates_times_the_choice_and_the_gain():
    out = Outcome("loss.chunk", 19, 17, {"2^19": Times((2.0, 2.1)), "2^17": Times((1.0,))}, {"2^21": "out of memory"})
    out.shown, out.gain, out.why = "2^17", 2.05, "faster than the prior"
    lines = tune.table([out.row()]).splitlines()
    assert lines[0].split() == ["choice", "candidate", "ms", "spread"]
    assert (
        "2.0 to 2.1" in lines[1]
        and lines[2].endswith("<-")
        and lines[3].endswith("2^21                     out of memory")
    )
    assert lines[4].endswith("chosen: 2^17, 2.05x (faster than the prior)")


def test_the_check_prints_errors_and_reasons_and_fails_where_one_disagrees(monkeypatch, capsys):
    rows = selfcheck.rows(["grouped_batch_norm"])
    monkeypatch.setattr(selfcheck, "rows", lambda: rows)
    assert main(["doctor", "--check"]) == 0
    out = capsys.readouterr().out
    assert "agrees" in out or "not here" in out
    planted(monkeypatch, "nan")
    if dispatch.availability()["grouped_batch_norm"]["cpp"]:
        pytest.skip("the extension is not built")
    bad = selfcheck.check("grouped_batch_norm", "cpp", selfcheck.device_of("cpp"))
    rows[0] |= {"reasons": bad.reasons, "error": bad.error, "missing": False}
    assert main(["doctor", "--check", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["reasons"] == bad.reasons
    assert "refused: " in doctor.check_table(rows) and "is not finite" in doctor.check_table(rows)
