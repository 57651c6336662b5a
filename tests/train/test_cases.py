"""Whole commands over a few drawn words, as people ran into them: each is one clear line, or a run that works."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rcmstr_fast.cli.main import main
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.runfolder import RunFolder
from tests.train.real import write_words

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "preset": "fast",
    "model.encoder": "resnet29",
    "model.width": 0.25,
    "model.projector_hidden": 16,
    "model.feature_dim": 16,
    "model.image_width": 36,
    "method.queue_size": 128,
    "method.momentum": 0.99,
    "optim.lr": 0.001,
    "data.workers": 1,
    "train.global_batch_size": 8,
    "train.steps": 2,
    "train.save_every": 2,
    "train.log_every": 1,
    "train.device": "cpu",
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "words")


def flags(words, run, **fields) -> list[str]:
    """Arguments of a tiny run; `fields` with __ for the dot."""
    values = TINY | {"data.roots": f"[{words}]", "run": run} | {k.replace("__", "."): v for k, v in fields.items()}
    return ["pretrain", *(f"--{name}={value}" for name, value in values.items())]


def refused(capsys, words, run, **fields) -> str:
    """The one line of a command that is refused with status 2."""
    capsys.readouterr()
    assert main(flags(words, run, **fields)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rcmstr pretrain: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim.lr", "-1"), ("optim.lr", ".inf"), ("optim.lr", ".nan"), ("optim.beta1", "1.0"), ("optim.beta2", "1.5"),
        ("optim.weight_decay", ".nan"), ("optim.clip", ".nan"), ("optim.min_lr", ".nan"), ("optim.min_lr", "1.0"),
        ("model.feature_dim", "-1"), ("model.projector_hidden", "-1"), ("method.num_blocks", "-1"),
        ("method.bn_group_size", "-1"), ("method.bn_group_size", "1"), ("seed", "99999999999999999999999"), ("data.workers", "-1"),
        ("train.log_every", "0"), ("train.save_minutes", ".nan"), ("data.epoch_size", "-5"), ("data.weights", "[.nan]"),
        ("model.projector_hidden", "1000000000000"), ("train.timeout_minutes", "0"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_before_anything_is_there(words, tmp_path, capsys, name, value):
    line = refused(capsys, words, tmp_path / "new" / "run", **{name.replace(".", "__"): value})
    assert line.startswith(f"rcmstr pretrain: {name} must be ") or name in line, line
    assert not (tmp_path / "new").exists()


def test_a_wrong_rectifier_leaves_the_folder_to_the_corrected_command(words, tmp_path, capsys):
    run = tmp_path / "new" / "run"
    fields = {"model__tps": "frozen", "model__tps_checkpoint": tmp_path / "nowhere.safetensors"}
    assert "nowhere.safetensors" in refused(capsys, words, run, **fields) and not (tmp_path / "new").exists()
    assert main(flags(words, run)) == 0
    assert RunFolder(run).last.is_file()


def test_a_run_that_never_saved_leaves_the_folder_to_the_corrected_command(words, tmp_path, capsys):
    """Its first step does not fit into the memory, which is known only then."""
    run = tmp_path / "run"
    assert "allocate memory" in refused(capsys, words, run, method__group_size=10**15)
    assert RunFolder(run).config.is_file()
    assert main(flags(words, run)) == 0
    assert main(flags(words, run, method__group_size=4)) == 2  # from now on it is the run's


@pytest.mark.parametrize(
    "fields", [{"optim__lr": 1e18, "optim__warmup_steps": 0}, {"optim__name": "sgd", "optim__lr": 1e18}]
)
def test_weights_that_an_update_breaks_are_no_success(words, tmp_path, capsys, fields):
    """In range, but far too large: the run is no success, and no file has a number that is not finite."""
    run = RunFolder(tmp_path / "run")
    refused(capsys, words, run.path, train__steps=4, train__save_every=1, **fields)
    assert "finished" not in run.text.read_text()
    if run.encoder.exists():
        assert all(x.isfinite().all() for x in load_file(run.encoder).values() if x.is_floating_point())
    if run.last.exists():
        state = checkpoint.load(run.last)["method"]
        assert all(x.isfinite().all() for x in state.values() if x.is_floating_point())


def test_a_checkpoint_of_another_run_is_refused(words, tmp_path, capsys):
    runs = {"a": {}, "b": {"method__queue_size": 64}, "c": {"method__momentum": 0.5, "seed": 9}}
    for name, fields in runs.items():
        assert main(flags(words, tmp_path / name, **fields)) == 0
    for name, words_of in (
        ("b", r"method.queue_size: 64 -> 128"),
        ("c", r"seed: 9 -> 0; method.momentum: 0.5 -> 0.99"),
    ):
        shutil.copy(RunFolder(tmp_path / name).last, RunFolder(tmp_path / "a").last)
        line = refused(capsys, words, tmp_path / "a", train__steps=3)
        assert f"last.pt: belongs to a run with another configuration ({words_of})" in line
    RunFolder(tmp_path / "a").last.unlink()  # the run's own is still there
    RunFolder(tmp_path / "a").checkpoints.joinpath("previous.pt").unlink(missing_ok=True)


def test_data_are_recognised_by_what_they_are(words, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(flags(words, run)) == 0
    moved = shutil.copytree(words, tmp_path / "moved")
    assert main(flags(moved, run, train__steps=3)) == 0
    assert "begins at step 2" in RunFolder(run).text.read_text()
    other = write_words(tmp_path / "other", 24)
    data = (other / "data.mdb").read_bytes()
    start = data.index(b"\x89PNG")
    (other / "data.mdb").write_bytes(data[: start + 40] + b"!!" + data[start + 42 :])
    assert "hold other images than" in refused(capsys, other, run, train__steps=4)


def test_what_changes_on_resume_is_said(words, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(flags(words, run, train__precision="auto")) == 0
    assert main(flags(words, run, train__precision="auto", train__steps=4)) == 0
    told = RunFolder(run).text.read_text()
    assert told.count("from here on the run is not what it was: the learning rate falls over 4 steps (2 before)") == 1


def test_a_name_that_is_no_utf8_works(words, tmp_path):
    name = os.fsdecode(b"donn\xe9es")
    run = tmp_path / name / "run"
    assert main(flags(words, run)) == 0 and main(flags(words, run, train__steps=3)) == 0
    assert checkpoint.load(RunFolder(run).last)["step"] == 3
    assert b"donn\\udce9es" in RunFolder(run).text.read_bytes()


def test_pictures_that_cannot_be_written_do_not_end_the_run(words, tmp_path, capsys):
    run = RunFolder(tmp_path / "run")
    assert main(flags(words, run.path, train__steps=1)) == 0
    run.pictures.unlink()
    run.pictures.mkdir()
    assert main(flags(words, run.path, train__steps=4, train__picture_every=1)) == 0
    assert run.text.read_text().count("views.png cannot be written") == 1


def script(words, run, after: str, **fields) -> subprocess.Popen:
    """The command in bash with redirections `after` it, in a session of its own; it tells the command's status.

    It does not ignore SIGHUP, also where the tests do (nohup).
    """
    line = " ".join(f"'{word}'" for word in flags(words, run, **fields))
    code = f"trap : INT; {sys.executable} -m rcmstr_fast.cli.main {line} {after}; echo status ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["bash", "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


@pytest.mark.parametrize("after", ["2>&1 >/dev/null | head -n 2 >/dev/null", "2>&-"])
def test_a_console_that_goes_away_does_not_end_the_run(words, tmp_path, after):
    run = RunFolder(tmp_path / "run")
    output, _ = script(words, run.path, after, train__steps=6, train__save_every=0).communicate(timeout=300)
    assert output == "status 0\n"
    assert checkpoint.load(run.last)["step"] == 6
    text = run.text.read_text()
    assert "finished at step 6" in text and text.count("the console is gone") == ("head" in after)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_with_tee_saves(words, tmp_path, number):
    run = RunFolder(tmp_path / "run")
    after = f"2>&1 | (trap - INT HUP; exec tee {tmp_path}/told.txt) >/dev/null"
    process = script(words, run.path, after, train__steps=20_000, train__save_every=0)
    while not (run.metrics.exists() and run.metrics.read_text().count("\n") > 2):
        assert process.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:  # the shell would go with it
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for child in found:
            os.kill(int(child), number)
    output, _ = process.communicate(timeout=300)
    assert output == f"status {128 + number}\n"
    text = run.text.read_text()
    reached = int(re.findall(r"saved .* at step (\d+)", text)[-1])
    assert checkpoint.load(run.last)["step"] == reached and f"stopped by {signal.Signals(number).name}" in text


def test_a_streak_of_bad_steps_at_the_end_is_not_finished(words, tmp_path, capsys, monkeypatch):
    from rcmstr_fast.train.stream import Stream

    batches = Stream.batches

    def poisoned(self, step, plan, world):
        for micro in batches(self, step, plan, world):
            for view in (view for batch in micro for view in batch.views.values()):
                view.mul_(float("nan") if step >= 2 else 1.0)
            step += 1
            yield micro

    monkeypatch.setattr(Stream, "batches", poisoned)
    run = RunFolder(tmp_path / "run")
    for _ in range(2):  # and it stays so
        line = refused(capsys, words, run.path, train__steps=4)
        assert "step 3: not finite: " in line and "the last 2 steps of the run changed nothing" in line
    assert "finished" not in run.text.read_text().replace("is not finished", "")
    assert all(torch.isfinite(x).all() for x in load_file(run.encoder).values() if x.is_floating_point())
