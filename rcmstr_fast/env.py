"""Every environment variable of rcmstr_fast, in one place (listed in docs/install.md).

Triton's own TRITON_INTERPRET is read in `ops.triton_backend`.
"""

import os
from pathlib import Path

import platformdirs

from rcmstr_fast.fields import ConfigError

#: name -> meaning; the page docs/install.md and `rcmstr doctor` show this table.
VARIABLES = {
    "RCMSTR_FAST_BACKEND": "force one backend for every operation: reference, chunked, cpp, triton or cuda",
    "RCMSTR_FAST_CUDA": "build time: auto (default), 0 or 1; 1 fails where nvcc is missing",
    "RCMSTR_FAST_CUDA_ARCHITECTURES": "build time: CMake list, default 80-real;90-real;90-virtual",
    "RCMSTR_FAST_THREADS": "threads of the compiled host functions and the loader (default: the CPU count)",
    "RCMSTR_FAST_MASKED_STAGES": "masked pass: dense, sparse, or the largest sparse share by sites as in 1:0.8,150:0.7",
    "RCMSTR_FAST_LOSS_LAUNCH": "loss terms of a step on a GPU: scheduled (one launch a pass) or separate",
    "RCMSTR_FAST_CACHE": "folder for hashes of pictures and what was measured here (default: the user's cache folder)",
    "RCMSTR_FAST_TUNE": "on or off in the place of train.tune=auto",
    "RCMSTR_FAST_DEBUG": "1: check values as well as shapes (unit length of rows, orders, finite queues); synchronises",
}


def backend() -> str | None:
    """The backend that RCMSTR_FAST_BACKEND orders, or None for automatic choice."""
    return os.environ.get("RCMSTR_FAST_BACKEND") or None


def threads() -> int:
    """Host threads to use: RCMSTR_FAST_THREADS or the CPUs this process may run on."""
    value = os.environ.get("RCMSTR_FAST_THREADS")
    if value is None:
        return len(os.sched_getaffinity(0))
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"RCMSTR_FAST_THREADS must be a whole number of 1 or more, got {value!r}")
    return int(value)


def threads_ordered() -> bool:
    """Whether RCMSTR_FAST_THREADS is set."""
    return "RCMSTR_FAST_THREADS" in os.environ


def tune() -> str | None:
    """What RCMSTR_FAST_TUNE orders in the place of `train.tune=auto`, or None."""
    value = os.environ.get("RCMSTR_FAST_TUNE") or None
    if value not in (None, "on", "off"):
        raise ConfigError(f"RCMSTR_FAST_TUNE must be on or off, got {value!r}")
    return value


def ordered() -> dict[str, str]:
    """The variables that are set, but for those that say where things are kept."""
    places = ("RCMSTR_FAST_CACHE", "RCMSTR_FAST_TUNE")
    return {name: os.environ[name] for name in VARIABLES if name in os.environ and name not in places}


def cache_folder() -> Path:
    """RCMSTR_FAST_CACHE, or the folder that the system has for caches of this user."""
    return Path(os.environ.get("RCMSTR_FAST_CACHE") or platformdirs.user_cache_dir("rcmstr_fast"))


def masked_stages() -> dict[int, float] | None:
    """What RCMSTR_FAST_MASKED_STAGES orders: sites -> largest share of active sites, or None."""
    value = os.environ.get("RCMSTR_FAST_MASKED_STAGES")
    if not value:
        return None
    if value in ("dense", "sparse"):
        return {} if value == "dense" else {1: 1.0}
    try:
        return {int(sites): float(share) for sites, share in (entry.split(":") for entry in value.split(","))}
    except ValueError:
        raise ConfigError(
            f"RCMSTR_FAST_MASKED_STAGES must be dense, sparse or entries sites:share, got {value!r}"
        ) from None


def loss_launch() -> str | None:
    """What RCMSTR_FAST_LOSS_LAUNCH orders, or None."""
    value = os.environ.get("RCMSTR_FAST_LOSS_LAUNCH") or None
    if value not in (None, "scheduled", "separate"):
        raise ConfigError(f"RCMSTR_FAST_LOSS_LAUNCH must be scheduled or separate, got {value!r}")
    return value


def debug() -> bool:
    """True where RCMSTR_FAST_DEBUG=1 asks for checks that read values."""
    return os.environ.get("RCMSTR_FAST_DEBUG") == "1"
