"""Where a piece runs, what it may use, and the record it leaves."""

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

from bench import timing
from rcmstr_fast.config import ConfigError, PretrainConfig, resolve
from rcmstr_fast.train.environment import extension, version_of

ROOT = Path(__file__).resolve().parents[2]
#: Folders whose contents decide results; a record holds for one state of them.
SOURCES = ("rcmstr_fast", "kernels", "csrc", "bench")
_SUFFIXES = {".py", ".cpp", ".cu", ".h"}


@dataclass(frozen=True)
class Setting:
    """What the person asked for.

    Attributes:
        out: folder of the records.
        device: cuda or cpu.
        dry: tiny sizes: the same code in seconds, on a CPU too.
        work: folder for everything else a piece makes.
        words: file of words to render, one a line; empty: the built-in list, or made-up words where it is missing.
        test: zip, folder or LMDB of labelled real words for `learning`; empty: rendered words that were held out.
        seed: of `learning`.
        steps: of each run of `learning`; 0: the piece's own.
        changes: `field=value` of the pretraining configuration of `learning` and `real`.
        tag: appended to the names of the records.
        limit: seconds a piece may take.
        commit: name of the commit for the records, where there is no git checkout.
    """

    out: Path
    device: str
    dry: bool = False
    work: Path = Path("build/gpu")
    words: str = ""
    test: str = ""
    seed: int = 0
    steps: int = 0
    changes: tuple[str, ...] = ()
    tag: str = ""
    limit: float = 470.0
    commit: str = ""

    @property
    def torch_device(self) -> torch.device:
        """The device of training."""
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device("cpu")

    @property
    def unfinished(self) -> Path:
        """Where a piece leaves what it has measured so far, for the case that it is stopped."""
        return self.work / "unfinished"

    def choose(self, full: Any, dry: Any) -> Any:
        """`full`, or `dry` in a dry run."""
        return dry if self.dry else full


Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """Something that `make gpu` measures.

    Attributes:
        name: of the piece and its record.
        about: what it does, in one line.
        run: gives the rows of the record.
        modules: Python packages it needs beyond torch and triton.
        tools: programs it needs.
        seeded: its record is one of a seed.
        holds: whether what it made is still there.
    """

    name: str
    about: str
    run: Callable[[Setting], Rows]
    modules: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    seeded: bool = False
    holds: Callable[[], bool] = lambda: True

    def missing(self) -> list[str]:
        """What this machine lacks for it beside a GPU."""
        lacks = [f"Python package {name}" for name in self.modules if importlib.util.find_spec(name) is None]
        return lacks + [f"program {name}" for name in self.tools if find_tool(name) is None]


def encoders(setting: Setting) -> tuple[str, ...]:
    """The CNN and the ViT that are measured; a dry run takes the smallest ViT alone."""
    return setting.choose(("resnet29", "vit_small"), ("vit_tiny",))


def find_tool(name: str) -> str | None:
    """Path of a program: on the PATH, beside this Python, or where CUDA is usually installed."""
    places = [None, str(Path(sys.executable).parent), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]
    return next((found for place in places if (found := shutil.which(name, path=place))), None)


def digest() -> str:
    """Twelve digits that name the state of the sources, with or without a git checkout."""
    total = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                total.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def describe(setting: Setting) -> dict[str, Any]:
    """The machine as `timing.describe` has it, and the state of the sources."""
    machine = timing.describe(setting.device)
    machine["sources"] = digest()
    if setting.commit:
        machine |= {"commit": setting.commit, "changed": False}
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine["memory_gib"] = properties.total_memory / 2**30
        machine["capability"] = f"{properties.major}.{properties.minor}"
        machine["cuda"] = torch.version.cuda
        machine["cudnn"] = torch.backends.cudnn.version()
    machine["extension"] = extension()
    machine["triton"] = version_of("triton")
    return machine


def record_name(piece: Piece, setting: Setting) -> str:
    """File name of the record of a piece."""
    parts = [piece.name, *([f"s{setting.seed}"] if piece.seeded else []), *([setting.tag] if setting.tag else [])]
    return "gpu-" + "-".join(parts) + ".json"


def write(piece: Piece, setting: Setting, rows: Rows) -> Path:
    """Write the record of a piece."""
    return timing.write_record(setting.out, record_name(piece, setting), describe(setting), rows)


def done(piece: Piece, setting: Setting) -> Path | None:
    """The record of the piece for these sources, if every row of it could be measured."""
    for path in sorted(setting.out.glob(f"*/{record_name(piece, setting)}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        rows = record["rows"]
        whole = bool(rows) and all(row.get("status") != "stopped" for row in rows)
        if whole and piece.holds() and record["machine"].get("sources") == digest():
            return path
    return None


def pretrain_config(values: dict[str, Any], changes: tuple[str, ...] = ()) -> PretrainConfig:
    """A resolved configuration from nested values, then `dotted.field=value` changes (YAML values).

    Raises:
        ConfigError: an unknown field.
    """
    import yaml

    values = json.loads(json.dumps(values))
    for change in changes:
        name, _, value = change.partition("=")
        place = values
        *outer, last = name.split(".")
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = yaml.safe_load(value)
    return resolve(_built(PretrainConfig, values, ""))


def _built(cls: type, values: dict[str, Any], prefix: str) -> Any:
    known, types = {f.name for f in fields(cls)}, get_type_hints(cls)
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown field {prefix}{name}")
    made = {}
    for name, value in values.items():
        made[name] = _built(types[name], value, f"{name}.") if is_dataclass(types[name]) else value
    return cls(**made)
