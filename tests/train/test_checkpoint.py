import errno
import os
import pickle
import resource
import threading

import pytest
import torch

from rcmstr_fast.config import ConfigError, RunError
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.runfolder import RunFolder
from tests.train.toy import toy_run


def test_save_keeps_the_previous_and_load_gives_back(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    for step in (1, 2):
        checkpoint.save(path, {"step": step, "x": torch.arange(4), "nested": [{"a": None}]}, keep_previous=True)
    assert checkpoint.load(path)["step"] == 2
    assert checkpoint.load(path.with_name("previous.pt"))["step"] == 1
    assert torch.equal(checkpoint.load(path)["x"], torch.arange(4)) and checkpoint.newest(path.parent) == path
    assert sorted(p.name for p in path.parent.iterdir()) == ["last.pt", "previous.pt"]


def test_every_cut_is_recognised(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"x": torch.arange(100)})
    data = path.read_bytes()
    for length in range(0, len(data), 97):
        path.write_bytes(data[:length])
        assert checkpoint.damage(path), length


class Executes:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_foreign_files_are_one_line_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign = {
        "text.pt": lambda p: p.write_text("hello"),
        "pickle.pt": lambda p: p.write_bytes(pickle.dumps(Executes())),
        "code.pt": lambda p: torch.save({"kind": checkpoint.KIND, "format": 1, "x": Executes()}, p),
        "list.pt": lambda p: torch.save([1, 2], p),
        "other.pt": lambda p: torch.save({"state_dict": {}}, p),
        "newer.pt": lambda p: torch.save({"kind": checkpoint.KIND, "format": 99}, p),
        "absent.pt": lambda p: None,
    }
    for name, make in foreign.items():
        make(tmp_path / name)
        with pytest.raises(ConfigError, match=name) as error:
            checkpoint.load(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def file_limit():
    """Let no file grow beyond some bytes: a write then fails half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, file_limit):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1}, keep_previous=True)
    file_limit(100_000)
    with pytest.raises(RunError, match=r"cannot save .*: File too large, .* GiB free; earlier checkpoints are intact"):
        checkpoint.save(path, {"step": 2, "x": torch.zeros(1_000_000)}, keep_previous=True)
    assert checkpoint.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_full_disk_ends_a_run_with_status_2_and_it_continues_later(tmp_path, monkeypatch):
    class Full:
        """A disk that is full from the second checkpoint on."""

        saves = 0

        def save(self, state, file):
            self.saves += "optimizer" in state
            if self.saves > 1:
                file.file.write(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return save(state, file)

    save = torch.save
    with monkeypatch.context() as patch, pytest.raises(RunError, match="No space left on device") as error:
        patch.setattr(torch, "save", Full().save)
        toy_run(tmp_path / "run")
    assert error.value.status == 2
    folder = RunFolder(tmp_path / "run")
    assert checkpoint.load(folder.last)["step"] == 5
    assert not [p for p in folder.path.rglob("*.tmp")]
    assert "No space left on device" in folder.text.read_text()
    toy_run(tmp_path / "run")
    assert checkpoint.load(folder.last)["step"] == 12


def failing():
    raise RunError("cannot save x: No space left on device")


def test_writer_does_not_hold_up_and_keeps_the_order():
    gate, done = threading.Event(), []
    with checkpoint.Writer() as writer:
        writer.start(lambda: done.append(gate.wait(60)))
        writer.check()
        assert not done
        gate.set()
        writer.start(lambda: done.append("second"))
    assert done == [True, "second"]


def test_writer_reports_a_failure_at_the_next_look_start_or_end(caplog):
    for again in (checkpoint.Writer.check, lambda writer: writer.start(lambda: None)):
        with checkpoint.Writer() as writer:
            writer.start(failing)
            while not writer._pending.done():
                pass
            with pytest.raises(RunError, match="No space left"):
                again(writer)
            writer.check()
    with pytest.raises(RunError, match="No space left"), checkpoint.Writer() as writer:
        writer.start(failing)
    with pytest.raises(ValueError, match="first"), checkpoint.Writer() as writer:
        writer.start(failing)
        raise ValueError("first")
    assert "No space left" in caplog.text
