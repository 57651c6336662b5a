"""The example job script, with stand-ins for Slurm's commands: saved and requeued on SIGUSR1, then finished."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.runfolder import RunFolder
from tests.train.real import real_config, write_words

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "recipes" / "slurm" / "pretrain.sbatch"

# srun runs the step here; scancel signals its processes as Slurm does those of a step; scontrol notes the requeue.
STAND_INS = {
    "srun": 'echo $$ > "$STATE/step"; shift; exec "$@"',
    "scancel": 'pkill -USR1 -P "$(cat "$STATE/step")"; kill -USR1 "$(cat "$STATE/step")"',
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >> "$STATE/requeued"; else echo localhost; fi',
}


def test_the_script_is_a_correct_one():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    head = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --requeue" in head and "#SBATCH --signal=B:USR1@300" in head


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pkill") is None, reason="pkill is not installed")
def test_a_job_is_saved_requeued_and_finished(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    run = tmp_path / "run"
    fields = {"train__steps": 400, "method__bn_group_size": 2}
    config = real_config(run, write_words(tmp_path / "words"), **fields)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    environment = os.environ | {
        "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "STATE": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "PROCESSES": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }

    def submit(*more: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(SCRIPT), "--config", str(tmp_path / "config.yaml"), *more], env=environment, cwd=tmp_path
        )

    job, log, metrics = submit(), RunFolder(run).text, RunFolder(run).metrics
    deadline = time.monotonic() + 240
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=240) == 0
    assert (tmp_path / "requeued").read_text().split() == [str(os.getpid())]
    step = checkpoint.load(RunFolder(run).last)["step"]
    assert 3 <= step < 400 and f"stopped by SIGUSR1 at step {step}" in log.read_text()
    assert submit("--train.steps", str(step + 2), "--optim.warmup_steps", "40").wait(timeout=240) == 0
    assert checkpoint.load(RunFolder(run).last)["step"] == step + 2
    assert len((tmp_path / "requeued").read_text().split()) == 1
