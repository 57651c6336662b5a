"""Who may import whom (docs/architecture.md), read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rcmstr_fast"
EVERYONE = {"rcmstr_fast", "config", "console", "env", "fields", "random", "recipe_files"}
MAY_IMPORT = {
    "config": set(),
    "console": set(),
    "env": set(),
    "fields": set(),
    "recipe_files": set(),
    "random": set(),
    "kernels": {"kernels"},
    "reference": {"random", "reference"},
    "ops": {"ops", "kernels", "_C"},
    "models": {"models", "ops"},
    "methods": {"methods", "models", "ops"},
    "data": {"data", "ops", "_C"},
    "train": {"train", "methods", "models", "data", "ops", "_C"},
    "evaluation": {"evaluation", "train", "methods", "models", "data", "ops"},
    "study": {"study", "evaluation", "data", "train"},
    "cli": {"study", "cli", "evaluation", "train", "methods", "models", "data", "ops", "_C"},
}
#: libraries that only one file may import
ONE_FILE = {"lmdb", "sklearn", "nvidia", "matplotlib"}


def layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[:2] == ("ops", "reference"):
        return "reference"
    return parts[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" or p.parent != PACKAGE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers(path):
    mine = layer(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "rcmstr_fast" or len(parts) == 1:
            continue
        theirs = "reference" if parts[1:3] == ["ops", "reference"] else parts[1]
        if mine == "ops" and theirs == "reference":
            continue
        assert theirs in MAY_IMPORT[mine] | EVERYONE | {"__version__"}, f"{path}: layer {mine} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_devices_are_the_business_of_ops(path):
    if layer(path) in {"models", "methods", "data"}:
        assert ".is_cuda" not in path.read_text(encoding="utf-8")


def test_kernels_import_torch_and_triton_only():
    for path in PACKAGE.joinpath("kernels").resolve().glob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            own = name.startswith("rcmstr_fast.kernels")
            assert own or top in {"torch", "triton"} | sys.stdlib_module_names, f"{path}: imports {name}"


def test_heavy_libraries_have_one_file_each():
    users: dict[str, list[Path]] = {}
    for path in SOURCES:
        for top in {name.split(".")[0] for name in imports(path)} & ONE_FILE:
            users.setdefault(top, []).append(path)
    assert all(len(files) <= 2 for files in users.values()), users


def test_import_leaves_heavy_libraries_and_the_gpu_alone():
    code = (
        "import sys, torch, rcmstr_fast.ops;"
        "print(sorted({'lmdb', 'matplotlib', 'sklearn', 'tensorboard', 'triton'} & set(sys.modules)),"
        " torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
