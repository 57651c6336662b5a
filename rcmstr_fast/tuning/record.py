"""What is known of this machine from earlier runs: one JSON in the user's cache folder.

It holds, for every machine that has used this folder (a home may be shared by many), the verdicts of the self-check and
the choices of each kind of run. A machine is its device, driver and libraries and the digest of everything compiled; where
one of these changes, nothing that was found before counts. The file is replaced as a whole under a lock, so two
processes that tune at once both keep what they found.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import rcmstr_fast
from rcmstr_fast import env

#: Of the file; one that is older or newer is ignored.
FORMAT = 1
#: Machines and kinds of runs that are kept; the oldest go.
_MACHINES, _RUNS = 32, 64
_NAME = "tuning.json"
_log = logging.getLogger(__name__)
_told: set[str] = set()


def path() -> Path:
    """The file."""
    return env.cache_folder() / _NAME


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def version_of(distribution: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def digest() -> str:
    """Of every file whose change may change a verdict or a time: kernels, operations, the compiled extension."""
    root, found = Path(rcmstr_fast.__file__).parent, hashlib.blake2b(digest_size=8)
    for file in sorted([*(root / "kernels").rglob("*.py"), *(root / "ops").rglob("*.py"), *root.glob("_C*.so")]):
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """What must be the same for a record to count."""
    made: dict[str, Any] = {
        "device": processor(),
        "capability": platform.machine(),
        "driver": None,
        "cpus": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "digest": digest(),
        "version": rcmstr_fast.__version__,
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)
        made |= {"device": about.name, "capability": f"sm_{about.major}{about.minor}", "driver": driver()}
    return made


def key_of(facts: Any) -> str:
    """A short key of plain values."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read(device: torch.device) -> dict[str, Any]:
    """What is known of this machine: `checks` and `runs`, empty where nothing is. Never raises."""
    found, about = _machines(), machine(device)
    mine = found.get(key_of(about))
    if isinstance(mine, dict) and mine.get("machine") == about and _sound(mine):
        return mine
    if found:
        _tell(f"{path()} is of another machine or version than {about['device']}: what it holds is not used")
    return {"machine": about, "checks": {}, "runs": {}}


def _sound(mine: dict[str, Any]) -> bool:
    runs, checks = mine.get("runs"), mine.get("checks")
    return isinstance(runs, dict) and isinstance(checks, dict) and all(isinstance(x, dict) for x in runs.values())


def _machines() -> dict[str, Any]:
    """The machines of the file; a file that is missing, cut or of another format has none."""
    try:
        held = json.loads(path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _tell(f"{path()} cannot be used and is ignored ({error})")
        return {}
    if not isinstance(held, dict) or held.get("format") != FORMAT or not isinstance(held.get("machines"), dict):
        _tell(f"{path()} is of another version and is ignored")
        return {}
    return held["machines"]


def update(device: torch.device, change: Callable[[dict[str, Any]], None]) -> bool:
    """Let `change` edit what is known of this machine in place, and keep it; False (and one warning) where it cannot."""
    try:
        with _locked():
            mine = read(device)
            change(mine)
            mine["runs"] = dict(list(mine["runs"].items())[-_RUNS:])
            others = {key: held for key, held in _machines().items() if key != key_of(mine["machine"])}
            kept = {**dict(list(others.items())[1 - _MACHINES :]), key_of(mine["machine"]): mine}
            _replace(json.dumps({"format": FORMAT, "machines": kept}, indent=1))
        return True
    except OSError as error:
        _tell(f"what was found about this machine cannot be kept in {path()} ({error.strerror or error})", warn=True)
        return False


def _replace(text: str) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{_NAME}.", dir=path().parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Make the folder and hold it, where the file system has locks."""
    path().parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path().parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _tell(line: str, *, warn: bool = False) -> None:
    """Log a line once a process."""
    if line not in _told:
        _told.add(line)
        _log.log(logging.WARNING if warn else logging.INFO, "%s", line)
