"""Times, peak memory and the description of the machine they were taken on."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rcmstr_fast

#: GPU name contains -> dense fp16 TF/s that large products reach, used as the floor of matrix work
PEAK_TFLOPS = {"H200": 790.0, "H100": 790.0, "A100": 312.0}


def describe(device: str) -> dict[str, Any]:
    """Machine, driver, clocks and versions of one run."""
    about: dict[str, Any] = {
        "commit": _run("git", "rev-parse", "--short", "HEAD"),
        "changed": bool(_run("git", "status", "--porcelain", "-uno")),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
        about["driver_and_clocks"] = _run(
            "nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"
        )
    else:
        about["gpu"], about["threads"] = "cpu", torch.get_num_threads()
    return about


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def quantiles(samples: list[float]) -> dict[str, float]:
    """Median with the 20 % and 80 % quantiles, in ms."""
    cuts = statistics.quantiles(samples, n=5)
    return {"ms": statistics.median(samples), "ms_20": cuts[0], "ms_80": cuts[3]}


def measure(run: Callable[[], Any], device: str, repetitions: int) -> dict[str, float]:
    """Time `run` after a warm-up.

    Args:
        run: one call of the provider.
        device: "cuda" (events, the L2 cache flushed before each call) or "cpu" (wall clock).
        repetitions: timed calls, at least 2.
    Returns:
        ms, ms_20, ms_80, and on CUDA peak_mib above what was allocated before.
    """
    for _ in range(3 if device == "cuda" else 1):
        run()
    if device == "cpu":
        samples = []
        for _ in range(repetitions):
            start = time.perf_counter()
            run()
            samples.append(1e3 * (time.perf_counter() - start))
        return quantiles(samples)
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for first, last in events:
        flush.zero_()
        first.record()
        run()
        last.record()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {**quantiles([first.elapsed_time(last) for first, last in events]), "peak_mib": peak}


def _program() -> str:
    """How this program was started: `python -m MODULE`, or the name of a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name


def write_record(out: Path, name: str, machine: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write a benchmark's result file `out/<gpu>/name`: machine, command, version, rows."""
    folder = out / machine["gpu"].replace(" ", "-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": machine,
        "command": " ".join([_program(), *sys.argv[1:]]),
        "version": rcmstr_fast.__version__,
        "rows": rows,
    }
    path = folder / name
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
