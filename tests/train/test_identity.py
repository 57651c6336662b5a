"""Whose a checkpoint is, and what the data are recognised by."""

import dataclasses
import shutil

import pytest
import torch

from rcmstr_fast.config import ConfigError, resolve
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.source import open_sources
from rcmstr_fast.train import identity
from rcmstr_fast.train.distributed import World
from rcmstr_fast.train.identity import check_owner, facts, fingerprint, same_everywhere, what_changed
from tests.train.toy import toy_config


def write(folder, values):
    write_lmdb(folder, ((value, None) for value in values))
    return folder


def of(*roots) -> str:
    return fingerprint(open_sources([str(root) for root in roots]))


def test_the_same_data_are_recognised_wherever_they_lie(tmp_path):
    values = [b"%d" % i * 40 for i in range(200)]
    first = write(tmp_path / "a", values)
    assert of(first) == of(shutil.copytree(first, tmp_path / "moved")) and len(of(first)) == 32
    others = {
        "fewer": values[:-1],
        "the last": [*values[:-1], b"another"],
        "order": values[::-1],
        "all": [value + b"x" for value in values],
    }
    for name, changed in others.items():
        assert of(write(tmp_path / name, changed)) != of(first), name


def test_sizes_of_the_roots_and_unreadable_records_count(tmp_path):
    values = [b"%d" % i for i in range(6)]
    one, two = write(tmp_path / "one", values[:2]), write(tmp_path / "two", values[2:])
    three, four = write(tmp_path / "three", values[:3]), write(tmp_path / "four", values[3:])
    assert of(one, two) != of(three, four) and of(one, two) != of(two, one)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"x")
    readable = of(folder)
    (folder / "a.png").unlink()
    (folder / "a.png").mkdir()
    shutil.rmtree(folder / "a.png")
    (folder / "a.png").symlink_to("nowhere")
    assert of(folder) != readable


def test_the_owner_is_the_same_configuration_over_the_same_data(tmp_path):
    state = {"config": dataclasses.asdict(config()), "data": "x"}
    check_owner(tmp_path, state, config(), "x")
    check_owner(tmp_path, state, config(data__roots=["b"], train__steps=9), "x")
    old = {"config": state["config"]}  # written before data were recognised
    check_owner(tmp_path, old, config(), "x")
    with pytest.raises(ConfigError, match=r"belongs to a run with another configuration \(seed: 0 -> 1\)"):
        check_owner(tmp_path, state, config(seed=1), "x")
    with pytest.raises(ConfigError, match=r"data.roots: \['b'\] hold other images than \['a'\]"):
        check_owner(tmp_path, state, config(data__roots=["b"]), "y")
    with pytest.raises(ConfigError, match="does not say by what the data would be recognised"):
        check_owner(tmp_path, old, config(data__roots=["b"]), "x")
    with pytest.raises(ConfigError, match="does not say of which run it is"):
        check_owner(tmp_path, {"config": 3}, config(), "x")


def config(**fields):
    return resolve(toy_config("x", **({"data__roots": ["a"]} | fields)))


def test_processes_must_see_the_same_data():
    class Two(World):
        """A second process with other data."""

        def gather(self, tensor):
            return torch.cat([tensor, tensor + 1])

    cpu = torch.device("cpu")
    assert same_everywhere("f" * 32, World(cpu)) == "f" * 32 and same_everywhere(None, World(cpu)) is None
    with pytest.raises(ConfigError, match="rank 1 sees other ones"):
        same_everywhere("f" * 32, Two(cpu, 0, 2))


def test_what_changed_is_one_line(monkeypatch):
    cpu = torch.device("cpu")
    before = facts("bf16", 100, cpu)
    assert what_changed(before, facts("bf16", 100, cpu), cosine=True) is None
    assert what_changed(None, before, cosine=True) is None
    assert what_changed(before, facts("bf16", 200, cpu), cosine=False) is None
    line = what_changed(before, facts("fp32", 200, cpu), cosine=True)
    assert line == (
        "from here on the run is not what it was: precision fp32 (bf16 before); the learning rate falls over 200 steps "
        "(100 before)"
    )
    monkeypatch.setenv("RCMSTR_FAST_MASKED_STAGES", "dense")
    monkeypatch.setattr(identity, "processor", lambda: "another CPU")
    line = what_changed(before, facts("bf16", 100, cpu), cosine=True)
    assert "processor another CPU (" in line and "tuning differ" in line
    assert "variables RCMSTR_FAST_MASKED_STAGES=dense (none before)" in line and "\n" not in line
