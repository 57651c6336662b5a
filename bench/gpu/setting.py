"""What the person asked for, and what a piece is."""

import hashlib
import importlib.util
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rcmstr_fast.measure.records import Row

ROOT = Path(__file__).resolve().parents[2]
#: Records of a checkout; a piece that has one here is done, whatever the output folder.
RESULTS = ROOT / "bench" / "results"
#: Folders whose contents decide results; a record holds for one state of them.
SOURCES = ("rcmstr_fast", "kernels", "csrc", "bench")
_SUFFIXES = {".py", ".cpp", ".cu", ".h"}

Rows = list[Row]


def _forget(rows: Rows) -> None:
    """Keep nothing."""


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
        changes: `field=value` of the pretraining configuration of the pieces that train.
        tag: appended to the names of the pieces in the records.
        limit: seconds a piece may take.
        commit: name of the commit for the records, where there is no git checkout.
        keep: takes the rows of the running piece so far, so that they survive its end by force.
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
    keep: Callable[[Rows], None] = field(default=_forget, compare=False)

    @property
    def torch_device(self) -> torch.device:
        """The device of training."""
        return torch.device("cuda", 0) if self.device == "cuda" else torch.device("cpu")

    def choose(self, full: Any, dry: Any) -> Any:
        """`full`, or `dry` in a dry run."""
        return dry if self.dry else full


@dataclass(frozen=True)
class Piece:
    """Something that `make gpu` measures.

    Attributes:
        name: of the piece.
        family: of the record file that it shares with others.
        about: what it does, in one line.
        run: gives the rows of the record.
        modules: Python packages it needs beyond torch and triton.
        tools: programs it needs.
        seeded: it is another piece for each seed.
        holds: whether what it made is still there.
    """

    name: str
    family: str
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
