import dataclasses
import json

import pytest
import yaml

from rcmstr_fast.config import ConfigError, PretrainConfig, resolve
from rcmstr_fast.methods import settings
from rcmstr_fast.train.runfolder import RunFolder, differences
from tests.train.toy import toy_run


def test_folder_that_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty and not a run \(no config.yaml\)"):
        toy_run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", ["[1, 2", "a: 1", "- x", "\x00"])
def test_foreign_config_is_refused(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config.yaml: expected the configuration"):
        toy_run(tmp_path)


def test_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match="must be a folder"):
        toy_run(tmp_path / "run")


def test_other_configuration_is_refused_with_both_values(tmp_path):
    run = toy_run(tmp_path / "run", train__steps=2)
    with pytest.raises(ConfigError, match=r"\(seed: 0 -> 1; optim.lr: 0.01 -> 0.02\)"):
        toy_run(run, train__steps=2, seed=1, optim__lr=0.02)


def test_lengths_and_intervals_may_change(tmp_path):
    run = toy_run(tmp_path / "run", train__steps=2)
    toy_run(run, train__steps=4, train__log_every=1, train__save_every=1, data__workers=3, data__prefetch=4)
    assert [json.loads(x)["step"] for x in RunFolder(run).metrics.read_text().splitlines()] == [2, 3, 4]
    assert len(json.loads((run / "environment.json").read_text())["sessions"]) == 2


def test_config_is_resolved_and_runs_again(tmp_path):
    run = toy_run(tmp_path / "run", train__steps=20)
    held = yaml.safe_load(RunFolder(run).config.read_text())
    assert held["optim"]["warmup_steps"] == 2 and held["method"]["name"] == "toy"
    assert toy_run(run, **{f"optim__{k}": v for k, v in held["optim"].items()}, train__steps=20) == run


def test_folder_in_use_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(ConfigError, match="in use by another process"):
        toy_run(tmp_path / "run")
    toy_run(tmp_path / "run", train__steps=1)


def test_differences_name_absent_fields():
    assert differences({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == ["a.c: 'absent' -> 2"]
    assert differences({"a": {"old": 1}}, {"a": {}}) == ["a.old: 1 -> 'absent'"]


def test_a_run_of_version_0_1_is_continued_or_refused_with_one_line(tmp_path):
    """There all methods had one set of fields, and the default preset was fast."""
    config = resolve(PretrainConfig(run=str(tmp_path), method=settings("seqmoco")))
    held = dataclasses.asdict(config)
    held["method"] |= {"mask_ratio": 0.7, "coupled": False}
    del held["method"]["momentum_ramp"], held["optim"]["rho"]
    (tmp_path / "checkpoints").mkdir()  # it has saved
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(held))
    assert RunFolder(tmp_path).adopt(config) is config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(held | {"preset": "fast"}))
    with pytest.raises(ConfigError, match="preset: 'fast' -> 'paper'"):
        RunFolder(tmp_path).adopt(config)
