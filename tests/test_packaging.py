"""What `pip install` gets: the source distribution is complete, and the wheel that is built from it works by itself."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "runs", "shared", "carry", "*.so", "*.egg-info", "__pycache__")

pytestmark = pytest.mark.slow


def run(*words, folder: Path, **environment: str) -> str:
    """Output of a command that must end with 0."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run([str(word) for word in words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the source distribution of this tree and the wheel built from it, as `python -m build` makes them."""
    build = pytest.importorskip("build", reason="the package build is not installed")
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=LEFT_OUT)
    options = ["--no-isolation", "--skip-dependency-check", "--outdir", folder / "dist"]
    found = str(Path(build.__file__).parents[1])  # it may stand beside the environment's packages
    run(sys.executable, "-m", "build", *options, folder=folder / "source", RCMSTR_FAST_CUDA="0", PYTHONPATH=found)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment that holds the wheel alone; what it needs is borrowed from this one, so nothing is downloaded."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    # A .pth file adds a folder without following the .pth files in it, such as that of an editable installation.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=folder)
    return folder


def test_the_source_distribution_has_everything_that_is_compiled_or_read(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder in ("csrc", "kernels", "recipes"):
        own = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts}
        assert own <= names, sorted(own - names)
    assert {"CMakeLists.txt", "setup.py", "LICENSE", "rcmstr_fast/recipes/cnn_rcmstr.yaml"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_has_the_package_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rcmstr_fast"}
    package = ROOT / "rcmstr_fast"
    wanted = [path for path in package.rglob("*.py")] + [*(package / "recipes").rglob("*.yaml")]
    wanted += [package / "py.typed", *(package / "kernels").rglob("*.py")]
    assert {f"rcmstr_fast/{path.relative_to(package)}" for path in wanted} <= names
    assert any(re.fullmatch(r"rcmstr_fast/_C\..*\.so", name) for name in names)


def test_the_installed_wheel_works_away_from_a_checkout(installed):
    command = installed / "venv" / "bin" / "rcmstr"
    where = run(
        installed / "venv" / "bin" / "python", "-c", "import rcmstr_fast; print(rcmstr_fast.__file__)", folder=installed
    )
    assert Path(where.strip()).is_relative_to(installed)
    assert "cnn_rcmstr" in run(command, "recipes", folder=installed)
    assert "cnn_rcmstr" in run(command, "methods", folder=installed)
    doctor = run(command, "doctor", folder=installed)
    assert re.search(r"cpp", doctor)
    asked = ["pretrain", "--config", "cnn_rcmstr", "--data.roots", "words", "--print_config"]
    assert "name: rcmstr" in run(command, *asked, folder=installed)


def container_steps() -> list[tuple[str, str]]:
    """(instruction, rest) of each instruction of the Dockerfile, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_container_file_works_as_shell(tmp_path):
    """Its steps without a daemon: what it copies is there and enough to configure the build, its lists are right.

    apt-get, pip's downloads and the compilation itself are left out: the wheel above is compiled from the same files.
    """
    steps = container_steps()
    for name, rest in steps:
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
        elif name == "COPY" and "--from" not in rest:
            *sources, target = shlex.split(rest)
            for source in sources:
                assert (ROOT / source).exists(), source
                copied = tmp_path / target / ("" if (ROOT / source).is_file() else ".")
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, copied, symlinks=True, ignore=LEFT_OUT, dirs_exist_ok=True)
                else:
                    shutil.copy(ROOT / source, copied)
    (listing,) = [rest for name, rest in steps if name == "RUN" and "requirements.txt" in rest]
    listing = listing.split("&&")[0].replace("/opt/rcmstr/bin/python", sys.executable)
    if sys.version_info >= (3, 11):  # tomllib; the image has 3.12
        run("sh", "-c", listing, folder=tmp_path)
        wanted = (tmp_path / "requirements.txt").read_text().split("\n")
        assert {"torch", "nvidia-dali-cuda130", "zhconv", "wordfreq"} <= {re.split(r"[>=\[]", x)[0] for x in wanted}
    run(sys.executable, "setup.py", "-q", "egg_info", folder=tmp_path)
    assert "rcmstr_fast/recipes/cnn_rcmstr.yaml" in (tmp_path / "rcmstr_fast.egg-info/SOURCES.txt").read_text()
    import pybind11

    run(
        "cmake",
        "-S",
        ".",
        "-B",
        "configured",
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DRCMSTR_FAST_CUDA=0",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DRCMSTR_FAST_OUTPUT={tmp_path}",
        folder=tmp_path,
    )
    (installs,) = [rest for name, rest in steps if name == "RUN" and "--no-deps ." in rest]
    assert "RCMSTR_FAST_CUDA=1" in installs, "without it a missing compiler would go unnoticed"
