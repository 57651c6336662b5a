"""The commit that records name, and that asking for it disturbs no other git in the checkout."""

import os
import subprocess

import pytest

from rcmstr_fast.train import commit as module


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "rcmstr_fast/train/commit.py"))

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True)

    try:
        git("init")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs git: {error}")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    return tmp_path, git("rev-parse", "HEAD").stdout.strip()


def test_commit_and_its_changes(checkout):
    folder, head = checkout
    assert module.commit() == head
    (folder / "beside").write_text("b")  # of no commit, and no change of one
    assert module.commit() == head
    (folder / "file").write_text("b")
    assert module.commit() == head + "+"


def test_the_index_is_not_written(checkout):
    folder, head = checkout
    os.utime(folder / "file", (1, 1))  # a plain status would note this in the index, under its lock
    before = (folder / ".git/index").read_bytes()
    assert module.commit() == head and (folder / ".git/index").read_bytes() == before
    (folder / ".git/index.lock").write_text("")
    assert module.commit() == head


def test_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "rcmstr_fast/train/commit.py"))
    assert module.commit() is None
