"""Who may import whom (docs/architecture.md), read from the sources."""

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rcmstr_fast"
EVERYONE = {"rcmstr_fast", "charset", "config", "console", "env", "fields", "random", "recipe_files"}
MAY_IMPORT = {
    "charset": set(),
    "config": set(),
    "console": set(),
    "env": set(),
    "fields": set(),
    "recipe_files": set(),
    "random": set(),
    "kernels": {"kernels"},
    "timer": set(),
    "tuning": {"tuning", "timer"},
    "reference": {"random", "reference"},
    "ops": {"ops", "kernels", "tuning", "_C"},
    "models": {"models", "ops"},
    "methods": {"methods", "models", "ops"},
    "data": {"data", "ops", "tuning", "_C"},
    "train": {"train", "methods", "models", "data", "ops", "tuning", "timer", "_C"},
    "evaluation": {"evaluation", "train", "methods", "models", "data", "ops"},
    "drawing": set(),
    "study": {"study", "evaluation", "data", "train", "drawing"},
    "plots": {"plots", "study", "evaluation", "models", "data", "ops", "drawing"},
    "measure": {"measure", "timer", "train", "methods", "models", "data", "ops", "tuning"},
    "exchange": {"exchange", "evaluation", "train", "models", "data", "ops"},
    "api": {"exchange", "train", "cli"},
    "cli": {
        "cli",
        "exchange",
        "study",
        "plots",
        "drawing",
        "measure",
        "evaluation",
        "train",
        "methods",
        "models",
        "data",
        "ops",
        "tuning",
        "_C",
    },
}
#: libraries that only one file may import
ONE_FILE = {"lmdb", "sklearn", "nvidia", "matplotlib"}
#: libraries that only tests import: their formats are written and read without them
TESTS_ONLY = {"timm", "torchvision", "pandas"}


def layer_of(parts: Sequence[str]) -> str:
    """The layer of a module by the parts of its name inside the package; references, and the plain data
    they are written with, are a layer of their own.
    """
    plain = {"reference", "parameters", "presets", "layers"}
    return "reference" if parts[0] == "ops" and not plain.isdisjoint(parts) else parts[0]


def layer(path: Path) -> str:
    return layer_of(path.relative_to(PACKAGE).with_suffix("").parts)


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
        theirs = layer_of(parts[1:])
        if mine == "ops" and theirs == "reference":
            continue
        assert theirs in MAY_IMPORT[mine] | EVERYONE | {"__version__"}, f"{path}: layer {mine} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_devices_are_the_business_of_ops(path):
    if layer(path) in {"models", "methods", "data"}:
        assert ".is_cuda" not in path.read_text(encoding="utf-8")


def test_kernels_import_torch_and_triton_only():
    for path in PACKAGE.joinpath("kernels").resolve().rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            own = name.startswith("rcmstr_fast.kernels")
            assert own or top in {"torch", "triton"} | sys.stdlib_module_names, f"{path}: imports {name}"


def test_operations_reach_the_extension_through_one_module():
    users = {p.name for p in SOURCES if layer(p) == "ops" and "rcmstr_fast._C" in imports(p)}
    assert users == {"native.py"}


def test_an_operation_and_its_kernels_have_one_name():
    """Whoever reads ops/<name>/triton.py finds the kernels in kernels/<name>.py or in the folder kernels/<name>."""
    kernels = {p.stem for p in PACKAGE.joinpath("kernels").resolve().iterdir()}
    families = {p.parent.name for p in PACKAGE.joinpath("ops").glob("*/triton.py")}
    assert len(families) > 5 and families <= kernels


def test_heavy_libraries_have_one_file_each():
    users: dict[str, list[Path]] = {}
    for path in SOURCES:
        for top in {name.split(".")[0] for name in imports(path)} & (ONE_FILE | TESTS_ONLY):
            users.setdefault(top, []).append(path)
            assert top not in TESTS_ONLY, path
    assert all(len(files) <= 2 for files in users.values()), users


def test_import_leaves_heavy_libraries_and_the_gpu_alone():
    code = (
        "import sys, torch, rcmstr_fast.ops;"
        "print(sorted({'lmdb', 'matplotlib', 'sklearn', 'tensorboard', 'triton'} & set(sys.modules)),"
        " torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"


def test_no_import_of_the_measuring_rooms_goes_round_in_a_circle():
    """Imports inside of functions count; a package stands for its `__init__.py`, where that itself is asked for."""
    files = [*PACKAGE.joinpath("measure").glob("*.py"), *(ROOT / "bench").rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    graph = {}
    for name, path in names.items():
        found = imports(path) & names.keys()
        graph[name] = {other for other in found if not any(each.startswith(f"{other}.") for each in found)} - {name}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, {name: others & graph.keys() for name, others in graph.items()}
