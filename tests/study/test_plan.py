"""Study files: what they expand to, and what is refused in one line."""

from datetime import date
from pathlib import Path

import pytest
import yaml

from rcmstr_fast.config import ConfigError
from rcmstr_fast.study.plan import cells, read_study

BASE = {
    "rows": [{"name": "A", "recipe": "a"}, {"name": "B", "encoder": "random", "like": "A"}],
    "evaluations": [{"name": "CTC", "set": {"train": ["{words}/x"]}}],
    "data": {"words": "somewhere"},
}


def written(tmp_path, change=None, text=None):
    path = tmp_path / "study.yaml"
    path.write_text(text if text is not None else yaml.safe_dump(BASE | (change or {}), sort_keys=False))
    return path


def recipes(tmp_path, text="seed: 0\n"):
    """Finds recipes a, c and so on, all of one text."""

    def find(name):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return path

    return find


def test_rows_times_seeds_times_evaluations(tmp_path):
    change = {"seeds": [0, 1], "pretrain": {"optim.lr": 0.001}}
    study = read_study(written(tmp_path, change))
    planned = cells(study, Path("out"), {"words": "/d"}, recipes(tmp_path))
    assert [(c.id, c.needs) for c in planned] == [
        ("pretrain/A-s0", ""),
        ("CTC/A-s0", "pretrain/A-s0"),
        ("pretrain/A-s1", ""),
        ("CTC/A-s1", "pretrain/A-s1"),
        ("CTC/B-s0", "pretrain/A-s0"),
        ("CTC/B-s1", "pretrain/A-s0"),
    ]
    assert planned[0].arguments() == [
        "pretrain",
        "--config",
        str(tmp_path / "a.yaml"),
        "--optim.lr=0.001",
        "--run=out/pretrain/A-s0",
        "--seed=0",
    ]
    assert planned[1].values["train"] == ["/d/x"] and planned[1].values["encoder"] == "out/pretrain/A-s0"
    assert planned[4].values["encoder"] == "random" and planned[4].values["like"] == "out/pretrain/A-s0"


def test_the_same_command_has_one_digest_wherever_it_stands(tmp_path):
    def digests(change=None, out="out", text="seed: 0\n"):
        study = read_study(written(tmp_path, {"data": {"words": {"count": 9, "seed": 0}}} | (change or {})))
        planned = cells(study, Path(out), {"words": f"{out}/data/words"}, recipes(tmp_path, text))
        return {(cell.evaluation, cell.row): cell.digest for cell in planned}

    first = digests()
    assert len(set(first.values())) == 3 and digests(out="elsewhere") == first
    other = digests({"rows": [{"name": "Z", "recipe": "a"}]})
    assert other == {("", "Z"): first["", "A"], ("CTC", "Z"): first["CTC", "A"]}
    for changed in (
        digests({"data": {"words": {"count": 9, "seed": 1}}, "pretrain": {"data.roots": ["{words}"]}}),
        digests({"pretrain": {"optim.lr": 1}}),
        digests(text="seed: 1\n"),
        digests({"seeds": [1]}),
    ):
        assert not set(changed.values()) & set(first.values())
    assert len(digests({"pretrain": {"a": date(2026, 1, 1)}})) == 3  # whatever YAML has, the command will refuse
    assert digests({"pretrain": {"a": 1, "b": 2}}) == digests({"pretrain": {"b": 2, "a": 1}})


def test_grid(tmp_path):
    row = {"name": "ratio {method.mask_ratio} blocks {method.num_blocks}", "recipe": "a"}
    row["grid"] = {"method.mask_ratio": [0.3, 0.7], "method.num_blocks": [0, 1]}
    study = read_study(written(tmp_path, {"rows": [row]}))
    assert [r.name for r in study.rows][:2] == ["ratio 0.3 blocks 0", "ratio 0.3 blocks 1"]
    assert study.rows[3].set == {"method.mask_ratio": 0.7, "method.num_blocks": 1}


def test_a_study_builds_on_another(tmp_path):
    written(tmp_path, {"name": "first", "evaluate": {"steps": 5}})
    above = tmp_path / "above.yaml"
    above.write_text("base: study\nrows:\n- {name: C, recipe: c, evaluations: [CTC]}\n")
    study = read_study(above)
    assert study.name == "above" and [row.name for row in study.rows] == ["C"] and study.data == BASE["data"]
    found = cells(study, Path("out"), {"words": "/d"}, recipes(tmp_path))
    assert [c.id for c in found] == ["pretrain/C-s0", "CTC/C-s0"] and found[1].values["steps"] == 5
    for base in ("above", "none"):
        above.write_text(f"base: {base}\n")
        with pytest.raises(ConfigError, match="base must name another study in the same folder"):
            read_study(above)


def test_fields_of_an_anchor_may_come_again(tmp_path):
    text = "data: &a {x: 1, y: 2}\npretrain: {<<: *a, y: 3}\nrows: [{name: A, recipe: a}]\nevaluations: [{name: e}]\n"
    assert read_study(written(tmp_path, text=text)).pretrain == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rows": []}, "rows must be a list of one or more"),
        ({"sedes": [0]}, "unknown field sedes; did you mean seeds?"),
        ({"rows": [{"name": "A", "recipe": "a"}] * 2}, "rows must have different names, got 'A' twice"),
        ({"rows": [{"name": "A"}]}, "expected either recipe or encoder"),
        ({"rows": [{"name": "A", "recipe": "a", "sets": {}}]}, "rows: unknown field sets; did you mean set?"),
        ({"rows": [{"name": "A", "encoder": "random", "like": "C"}]}, "like must name a row with a recipe, got 'C'"),
        ({"evaluations": [{"name": "x", "command": "read"}]}, "command must be one of probe, finetune, segment"),
        ({"evaluations": [{"name": "x", "set": {"seed": 3}}]}, "seed is set by the study"),
        ({"rows": [{"name": "A", "recipe": "a", "evaluations": ["x"]}]}, "row A: evaluations must name evaluations"),
        ({"seeds": [-1]}, "seeds must be whole numbers of 0 or more, got -1"),
        ({"rows": [{"name": "A", "recipe": "a", "set": []}]}, "set must be a dict"),
    ],
)
def test_refused(tmp_path, change, said):
    with pytest.raises(ConfigError) as error:
        read_study(written(tmp_path, change))
    assert said in str(error.value) and str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_field_twice_and_no_yaml(tmp_path):
    with pytest.raises(ConfigError, match="line 1: seeds stands twice"):
        read_study(written(tmp_path, text="seeds: [0]\nrows: []\nseeds: [1]\n"))
    with pytest.raises(ConfigError, match="not a YAML file"):
        read_study(written(tmp_path, text="rows: [\n"))


def test_unknown_data(tmp_path):
    study = read_study(written(tmp_path))
    with pytest.raises(ConfigError, match="must name data of the study"):
        cells(study, Path("out"), {"other": "/d"}, recipes(tmp_path))
