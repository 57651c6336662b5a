"""On what something was measured: the one description of the machine that every record carries."""

import subprocess
from typing import Any

import torch

from rcmstr_fast.train.environment import environment


def describe() -> dict[str, Any]:
    """Versions, commit, command, processor and GPUs of this process, its threads, and driver and clocks of a GPU.

    It is what `rcmstr doctor` shows, without the long list of what each backend needs.
    """
    about = {name: value for name, value in environment().items() if name != "backends"}
    about["threads"] = torch.get_num_threads()
    if about["gpus"]:
        about["driver_and_clocks"] = driver_and_clocks()
        about["cudnn"] = torch.backends.cudnn.version()
    return about


def driver_and_clocks() -> str:
    """Driver version, clocks and power limit as nvidia-smi prints them; `unknown` without it."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def name_of(about: dict[str, Any]) -> str:
    """Short name of a described machine, for folders and tables: that of its first GPU, or `cpu`."""
    gpus = about.get("gpus") or []
    return (gpus[0]["name"] if gpus else "cpu").replace(" ", "-").lower()


def commit_of(about: dict[str, Any]) -> dict[str, Any]:
    """The commit of a described machine as pytest-benchmark writes it: `id` (None without a checkout) and `dirty`."""
    text = about.get("commit") or ""
    return {"id": text.rstrip("+") or None, "dirty": text.endswith("+")}
