"""Pieces about the machine and the code on it: build, ceilings, tests, sanitizer, steady steps."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench.gpu.recipes import Fields, configured, tiny
from bench.gpu.setting import ROOT, Rows, Setting, encoders, find_tool
from bench.gpu.speed import MASKED, masked_stages
from bench.step import products
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.measure.ceilings import measure_ceilings
from rcmstr_fast.measure.running import OurStep, exact_or_fast, made_up_batches, precision_of
from rcmstr_fast.train.distributed import World


def build(setting: Setting) -> Rows:
    """Compile rcmstr_fast._C in place with CMake; a dry run only configures, elsewhere."""
    import pybind11

    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for compiler in filter(None, [find_tool("nvcc")]):
        environment.setdefault("CUDACXX", compiler)
    folder = (setting.work / ("configured" if setting.dry else "extension")).absolute()
    output = folder if setting.dry else ROOT / "rcmstr_fast"
    configure = [
        find_tool("cmake") or "cmake",
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DRCMSTR_FAST_OUTPUT={output}",
        f"-DRCMSTR_FAST_CUDA={setting.choose('auto', '0')}",
        *(["-G", "Ninja"] if find_tool("ninja") else []),
    ]
    if setting.device == "cuda":
        major, minor = torch.cuda.get_device_capability(0)
        configure.append(f"-DRCMSTR_FAST_CUDA_ARCHITECTURES={major}{minor}-real")
    rows: Rows = []
    commands = [("configure", configure), ("compile", [configure[0], "--build", str(folder), "--parallel"])]
    for name, command in commands[: setting.choose(2, 1)]:
        start = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        tail = (done.stdout + done.stderr)[-1500:]
        status = "ok" if done.returncode == 0 else "failed"
        rows.append({"what": name, "status": status, "seconds": time.monotonic() - start, "output": tail})
        print(tail, flush=True)
        if status != "ok":
            return rows
    if not setting.dry:
        from rcmstr_fast.train.environment import extension

        rows.append({"what": "import", **extension()})
    return rows


def is_built() -> bool:
    """Whether the extension is here with its CUDA half: a record of the build may come from another machine."""
    from rcmstr_fast.train.environment import extension

    return bool(extension()["cuda"])


def ceilings(setting: Setting) -> Rows:
    """Copy, large product, and every dense layer of both encoders in three directions."""
    precision = setting.choose("bf16", "fp32")
    limits = measure_ceilings(setting.torch_device, precision)
    rows: Rows = [
        {"what": "product", "precision": precision, "tflop_per_s": limits.flop_per_s / 1e12, "source": limits.source},
        {"what": "copy", "gbyte_per_s": limits.bytes_per_s / 1e9, "source": limits.source},
    ]
    small: Fields = {"model.width": 0.25, "model.depth": 1} if setting.dry else {}
    for encoder in ("resnet29", setting.choose("vit_small", "vit_tiny")):
        config = configured({"model.encoder": encoder, **small})
        repetitions = setting.choose(20, 2)
        found = products.rows(config, setting.choose(512, 2), precision, setting.device, repetitions)
        rows += [{"what": "layer", "share_of_product": r["tflop_per_s"] * 1e12 / limits.flop_per_s, **r} for r in found]
        rows.append({"what": "products of a step", "encoder": encoder, "ms": products.step_ms(found, 2)})
    return rows


#: Test processes: most of their time goes into compiling kernels, on a core each.
_WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))


def _plugins(setting: Setting) -> list[str]:
    """Several processes and an end in good order, where pytest's plugins for them are installed."""
    found = {name: importlib.util.find_spec(name) is not None for name in ("xdist", "pytest_timeout")}
    parallel = ["-n", str(_WORKERS), "--dist", "worksteal"] if found["xdist"] and not setting.dry else []
    return parallel + ([f"--session-timeout={setting.limit - 40:.0f}"] if found["pytest_timeout"] else [])


def tests(setting: Setting, folders: tuple[str, ...]) -> Rows:
    """The suite's tests of what runs on a GPU (not the ahead-of-time builds); failures with their first lines."""
    chosen = setting.choose(folders, ("tests/ops/test_enqueue.py",))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *chosen,
            "-q",
            "--continue-on-collection-errors",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            "-W",
            "ignore",
            "--ignore=tests/kernels/test_aot.py",
            *_plugins(setting),
        ]
        limit = max(30.0, setting.limit - 10)
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
            summary = done.stdout.strip().splitlines()[-1:] or [done.stderr[-300:]]
        except subprocess.TimeoutExpired:
            return [{"status": "stopped", "reason": f"the tests took more than {limit:.0f} s"}]
        print(done.stdout[-3000:], flush=True)
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    rows: Rows = [{"what": "summary", "status": "ok" if done.returncode == 0 else "failed", "text": summary[0]}]
    rows[0]["tests"] = len(cases)
    for case in cases:
        for kind in ("failure", "error"):
            for found in case.findall(kind):
                lines = (found.get("message") or "").strip().splitlines()[:3]
                name = f"{case.get('classname')}::{case.get('name')}"
                rows.append({"what": name, "status": "failed", "text": " | ".join(lines)[:400]})
    return rows


def sanitize(setting: Setting, tool: str) -> Rows:
    """compute-sanitizer over a program that calls every operation at small sizes; on a CPU the program alone."""
    program = [sys.executable, "-m", "bench.gpu.every_kernel"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT)}
    command = program
    if setting.device == "cuda":
        path = find_tool("compute-sanitizer")
        command = [path or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(30.0, setting.limit - 15)
        )
    except subprocess.TimeoutExpired as error:
        seen = (error.stdout if isinstance(error.stdout, str) else (error.stdout or b"").decode()).splitlines()
        return [{"status": "stopped", "reason": f"{tool} needs longer; it got to {seen[-1] if seen else 'nothing'}"}]
    text = done.stdout + done.stderr
    print(text[-3000:], flush=True)
    errors = re.findall(r"ERROR SUMMARY: (\d+)", text) or re.findall(r"RACECHECK SUMMARY: (\d+)", text)
    called = re.findall(r"^called (\S+)", done.stdout, re.M)
    status = "ok" if done.returncode == 0 else "failed"
    found = sum(map(int, errors))
    return [{"tool": tool, "status": status, "errors": found, "called": called, "output": text[-4000:]}]


def once(setting: Setting) -> Rows:
    """Every operation and kernel once, without a sanitizer: the first thing to know about a new machine."""
    program = [sys.executable, "-m", "bench.gpu.every_kernel"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    called = re.findall(r"^called (\S+)", done.stdout, re.M)
    status = "ok" if done.returncode == 0 else "failed"
    return [{"what": "once", "status": status, "called": called, "output": (done.stdout + done.stderr)[-4000:]}]


def steady(setting: Setting) -> Rows:
    """Steps in torch's sync debug mode; and how far weights move with the graph, against without it.

    A CNN's masked pass is ordered to be dense and sparse, so that both are seen under capture.
    """
    rows: Rows = []
    for encoder in encoders(setting):
        for masked in MASKED if encoder == "resnet29" else ("",):
            with masked_stages(masked):
                rows += _steady(setting, encoder, {"encoder": encoder, "masked": masked})
            setting.keep(rows)
    return rows


def _steady(setting: Setting, encoder: str, head: dict) -> Rows:
    rows: Rows = []
    moved = {}
    for graph in ("off", "auto"):
        config = _small(setting, encoder, graph)
        with tempfile.TemporaryDirectory() as folder, exact_or_fast(config, setting.torch_device):
            world = World(setting.torch_device)
            ours = OurStep(config, world, Path(folder) / "run")
            before = ours.weights()
            batches = made_up_batches(config, ours.plan, world, 2)
            for i in range(setting.choose(12, 1)):
                ours.step(batches[i % 2])
            error = _watched(ours, batches, setting)
            moved[graph] = ours.weights() - before
        status = "ok" if not error else "failed"
        row = head | {"cuda_graph": graph, "status": status, "synchronises": error}
        rows.append(row | {"precision": precision_of(config, setting.torch_device)})
    difference = float((moved["auto"] - moved["off"]).norm() / moved["off"].norm())
    status = "ok" if difference < 0.2 else "failed"
    return [*rows, head | {"what": "graph against eager", "status": status, "difference": difference}]


def _watched(ours: OurStep, batches: list, setting: Setting) -> str:
    """The error of a step that waits for the device; empty where none does."""
    if setting.device != "cuda":
        ours.step(batches[0])
        return ""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(4):
            ours.step(batches[i % 2])
    except RuntimeError as error:
        return str(error)[:400]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return ""


def _small(setting: Setting, encoder: str, graph: str) -> PretrainConfig:
    values: Fields = {
        "model.encoder": encoder,
        "train.global_batch_size": 128,
        "train.device": setting.device,
        "train.cuda_graph": graph,
        "train.precision": "bf16",
        # SGD, whose update is in proportion to the gradient
        "optim.name": "sgd",
        "optim.lr": 0.01,
        "optim.warmup_steps": 0,
    }
    return configured(values | (tiny() if setting.dry else {}), setting.changes)
