"""What a run and `rcmstr doctor` report about the machine, the libraries and the backends."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import rcmstr_fast
import rcmstr_fast.ops
from rcmstr_fast import env
from rcmstr_fast.data.loader import chosen_decoder
from rcmstr_fast.ops import dispatch
from rcmstr_fast.ops.masked import storage
from rcmstr_fast.train.commit import commit
from rcmstr_fast.tuning.record import processor, version_of

_LIBRARIES = (
    "torch",
    "triton",
    "numpy",
    "Pillow",
    "lmdb",
    "safetensors",
    "jsonargparse",
    "tensorboard",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
)


def gpus() -> list[dict[str, Any]]:
    """Name, memory in GiB and compute capability of each visible GPU."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "capability": f"{p.major}.{p.minor}"}
        for p in found
    ]


def extension() -> dict[str, Any]:
    """Whether rcmstr_fast._C is there and whether it was built with CUDA."""
    try:
        from rcmstr_fast import _C  # type: ignore[attr-defined]  # compiled
    except ImportError as error:
        return {"built": False, "cuda": False, "reason": str(error)}
    return {"built": True, "cuda": bool(getattr(_C, "cuda", False))}


def environment() -> dict[str, Any]:
    """Everything about this process that can change a result or its speed; plain values for JSON."""
    decoder, why = chosen_decoder("auto")
    return {
        "version": rcmstr_fast.__version__,
        "commit": commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": gpus(),
        "cuda": torch.version.cuda,
        # Its metadata may lack what it was built for (+cu130), which its own version has.
        "libraries": {name: version_of(name) for name in _LIBRARIES} | {"torch": torch.__version__},
        "extension": extension(),
        "variables": {name: os.environ[name] for name in env.VARIABLES if name in os.environ},
        "backends": dispatch.availability(),
        "choices": [*storage.describe(), f"pictures are decoded by {decoder} (data.decoder=auto: {why})"],
    }


def session(world_size: int, tuned: dict[str, Any] | None = None) -> dict[str, Any]:
    """The entry of this session in `environment.json`.

    Args:
        world_size: processes.
        tuned: what it computes with by measurement; None: nothing was measured for it.
    """
    return {**environment(), "processes": world_size, **({} if tuned is None else {"tuned": tuned})}
