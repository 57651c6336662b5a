"""Runs in processes of their own, forked from a server that has torch imported already, so that they start at once."""

import importlib
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch._dynamo", "torch.utils.tensorboard", "tests.train.toy", "tests.train.real"])


def _main(module: str, words: list[str], environment: dict[str, str], stderr: str) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.clear()  # the server's is that of its start, which was another test's
    os.environ.update(environment)
    sys.exit(importlib.import_module(module).main(words))


class Started:
    """One process."""

    def __init__(self, module: str, words: list[str], environment: dict[str, str]) -> None:
        handle, name = tempfile.mkstemp(suffix=".stderr")
        os.close(handle)
        self._stderr = Path(name)
        self.process = _CONTEXT.Process(target=_main, args=(module, words, {**os.environ, **environment}, name))
        self.process.start()

    def wait(self) -> tuple[int, str]:
        """Exit status (minus the signal that ended it) and stderr."""
        self.process.join(timeout=300)
        text = self._stderr.read_text()
        self._stderr.unlink()
        return self.process.exitcode, text


def start(module: str, *words: str) -> Started:
    """Start `main(words)` of a module."""
    return Started(module, list(words), {})


def launch(module: str, *words: str, processes: int = 2, survives: bool = True) -> list[tuple[int, str]]:
    """Run `main(words)` in several processes with the environment that torchrun gives them.

    Where the last one does not survive, it is killed when the others have ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started = [
        Started(module, list(words), {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    ended = [process.wait() for process in started[:-1]]
    if not survives:
        started[-1].process.kill()
    return [*ended, started[-1].wait()]


def torchrun(module: str, *words: str, restarts: int = 0) -> subprocess.CompletedProcess:
    """Run `python -m MODULE WORDS` in two processes of torchrun itself, which starts both again after each death."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--max-restarts={restarts}",
        "--monitor-interval=0.1",
        "--master-port=0",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        "-m",
        module,
        *words,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


def kill_at_random_moments(module: str, run: Path, *words: str, within: float, times: int = 10) -> set[str]:
    """Start a run again and again and kill it `within` seconds; the steps at which it began.

    Every second time it has saved at least once before, so that it gets on also where the machine is busy. Where the
    machine is so fast that the run comes to its end, no more is killed.
    """
    drawn, log, reached = random.Random(0), run / "log.txt", set()

    def told(what: str) -> int:
        return log.read_text().count(what) if log.exists() else 0

    for number in range(times):
        awaited = "saved " if number % 2 else "begins at step"
        before = told(awaited)
        started = start(module, str(run), *words)
        while told(awaited) == before:
            if not started.process.is_alive():
                status, text = started.wait()
                assert status == 0, text
                return reached
            time.sleep(0.005)
        time.sleep(drawn.uniform(0.0, within))
        started.process.kill()
        started.wait()
        reached.add(log.read_text().rsplit("begins at step ", 1)[1].split()[0])
    return reached
