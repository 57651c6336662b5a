"""Pieces that measure speed: operations, masked pass, tiles, data path, whole steps, parts, kernels, memory."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rcmstr_fast.train.step_speed import OurStep, exact_or_fast, line, made_up_batches, measure, release, with_batch

from bench import step as bench_step
from bench.gpu.setting import ROOT, Rows, Setting, encoders, pretrain_config
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.train.distributed import World

#: Capacities in GiB of the table of largest batches, and the share of each that a run may take.
CARDS, USABLE = (12, 24, 40, 80, 140), 0.94


def of_main(setting: Setting, run: Callable[[list[str]], int], words: list[str]) -> Rows:
    """Rows of another benchmark's `main(words)`, which writes its own record, row by row (see `Setting.unfinished`)."""
    setting.unfinished.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(dir=setting.unfinished)
    status = run([*words, "--out", folder])
    (path,) = Path(folder).rglob("*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    if status and not any(row["status"] != "ok" for row in rows):
        rows.append({"status": "failed", "reason": f"it ended with status {status}"})
    return rows


def keep(setting: Setting, rows: Rows) -> None:
    """Leave the rows of a piece so far, for the case that it is stopped."""
    setting.unfinished.mkdir(parents=True, exist_ok=True)
    (setting.unfinished / "rows.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")


def operations(setting: Setting, only: tuple[str, ...]) -> Rows:
    """bench.ops, the entries whose operation and shape contain one of `only`."""
    from bench import ops

    dry = ["--only", "enqueue_", "--repetitions", "2"]
    runs = setting.choose([["--only", text] for text in only], [dry])
    return [row for words in runs for row in of_main(setting, ops.main, words)]


def masked_pass(setting: Setting) -> Rows:
    """bench.masked_pass at the training size, from few hidden sites to many."""
    from bench import masked_pass as bench

    full = ["--batch", "512", "--widths", "1", "--dtypes", "bfloat16", "--ratios", "0.7", "0.5", "0.3", "0.1"]
    dry = ["--batch", "2", "--widths", "0.125", "--only", "4x26", "--ratios", "0.5", "--repetitions", "2"]
    return of_main(setting, bench.main, setting.choose(full, dry))


def sweep(setting: Setting) -> Rows:
    """bench.sweep: its printed rows; it needs a GPU even for small sizes."""
    command = [sys.executable, "-m", "bench.sweep"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(30.0, setting.limit - 15))
    rows = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    if rows:
        return rows
    reason = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["it printed nothing"]
    return [{"status": "not run" if setting.device == "cpu" else "stopped", "reason": reason[0]}]


def data_path(setting: Setting) -> Rows:
    """Rates of the data path, its stages and their peers over rendered words."""
    from bench import pipeline
    from bench.gpu.training import words
    from rcmstr_fast.train import throughput

    values = recipe(setting, "resnet29")
    values["data"] = {"roots": [str(words(setting, "speed", setting.choose(20_000, 16), 0))]}
    config = pretrain_config(values, setting.changes)
    report = throughput.measure(config, seconds=setting.choose(20.0, 0.1), repetitions=setting.choose(5, 1))
    rates = {name: vars(rate) for name, rate in report.stages.items()}
    sides = {name: getattr(report, name) for name in ("data", "model", "both", "wait_percent")}
    rows: Rows = [{"what": "rates", "images_per_s": sides, "stages": rates, "verdict": report.verdict}]
    return rows + [{"what": "peer", **row} for row in pipeline.peers(throughput.sample(config), setting.choose(5, 1))]


def recipe(setting: Setting, encoder: str, method: str = "rcmstr", batch: int = 512, **train: Any) -> dict[str, Any]:
    """Nested values of a configuration: the training size, or the smallest one in a dry run."""
    values: dict[str, Any] = {"preset": "fast", "model": {"encoder": encoder}, "method": {"name": method}}
    values["train"] = {"global_batch_size": batch, "device": setting.device, **train}
    if setting.dry:
        values["model"] |= {"width": 0.25, "depth": 1, "projector_hidden": 32, "feature_dim": 16}
        values["method"]["queue_size"] = 64
        values["train"] |= {"global_batch_size": 4, "precision": "fp32"}
    return values


def steps(
    setting: Setting, encoder: str, providers: list[str], batches: tuple[int, ...], method: str = "rcmstr"
) -> Rows:
    """Whole steps of ours and of other providers at several batches."""
    rows: Rows = []
    encoder = setting.choose(encoder, encoder.replace("small", "tiny"))
    world, repetitions = World(setting.torch_device), setting.choose(20, 2)
    for batch in setting.choose(batches, (4,)):
        config = pretrain_config(recipe(setting, encoder, method, batch), setting.changes)
        others = bench_step.factories(providers)
        try:
            rows += measure(config, world, others, repetitions)
        except torch.cuda.OutOfMemoryError:
            rows.append({"provider": "ours", "encoder": encoder, "batch": batch, "status": "out of memory"})
        release(setting.torch_device)
        keep(setting, rows)
        for row in rows[-1 - len(providers) :]:
            print(line(row) if "ms" in row else row, flush=True)
    return rows


def switches(setting: Setting) -> Rows:
    """Ours with every combination of graph and compile, CNN and ViT."""
    rows: Rows = []
    for encoder in encoders(setting):
        for graph in setting.choose(("on", "off"), ("off",)):
            for compiled in setting.choose(("off", "on"), ("off",)):
                values = recipe(setting, encoder, cuda_graph=graph, compile=compiled)
                config = pretrain_config(values, setting.changes)
                try:
                    rows += measure(config, World(setting.torch_device), {}, setting.choose(20, 2))
                except RuntimeError as error:
                    wrong = {"status": "failed", "reason": str(error)[:300]}
                    rows.append({"encoder": encoder, "switches": {"cuda_graph": graph, "compile": compiled}} | wrong)
                release(setting.torch_device)
                keep(setting, rows)
    return rows


def parts(setting: Setting) -> Rows:
    """Every part of the step of ours and of the eager baseline, and where the kernels' time goes."""
    rows: Rows = []
    for encoder in encoders(setting):
        config = pretrain_config(recipe(setting, encoder), setting.changes)
        rows += bench_step.part_rows(config, ["eager"], World(setting.torch_device), setting.choose(20, 2))
        rows += kernels(setting, replace(config, train=replace(config.train, cuda_graph="off")))
        release(setting.torch_device)
    return rows


def kernels(setting: Setting, config: PretrainConfig) -> Rows:
    """The forty kernels (on a CPU: operators) that take most of the time of three steps, by torch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    device = setting.torch_device
    world, cuda = World(device), device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder, exact_or_fast(config, device):
        ours = OurStep(config, world, Path(folder) / "run")
        batches = made_up_batches(config, ours.plan, world, 1)[0]
        for _ in range(setting.choose(5, 1)):
            ours.step(batches)
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        count = setting.choose(3, 1)
        with profile(activities=kinds) as seen:
            for _ in range(count):
                ours.step(batches)
            if cuda:
                torch.cuda.synchronize()
    events = [e for e in seen.key_averages() if not cuda or e.device_type == DeviceType.CUDA]
    times = [(e.self_device_time_total if cuda else e.self_cpu_time_total, e) for e in events if not _named(e)]
    total = sum(time for time, _ in times) or 1.0
    top = sorted(times, key=lambda pair: -pair[0])[:40]
    head = {"what": "kernel", "encoder": config.model.encoder, "batch": config.train.global_batch_size}
    return [
        head | {"name": e.key[:160], "ms": time / 1e3 / count, "share": time / total, "calls": e.count / count}
        for time, e in top
    ]


def _named(event: Any) -> bool:
    """Whether an event is a name around others, not work itself."""
    return bool(getattr(event, "is_user_annotation", False)) or event.key.startswith(("Optimizer.", "ProfilerStep"))


def memory(setting: Setting) -> Rows:
    """Peak memory at several batches, with and without activation checkpointing, and the largest batch of each card."""
    rows: Rows = []
    for encoder in encoders(setting):
        for checkpointed in (False, True):
            values = recipe(setting, encoder, checkpoint_activations=checkpointed)
            config = pretrain_config(values, setting.changes)
            found: Rows = []
            for batch in setting.choose((128, 256, 512), (4,)):
                made = measure(with_batch(config, batch), World(setting.torch_device), {}, setting.choose(3, 1))
                found += [row | {"checkpointed": checkpointed} for row in made]
                release(setting.torch_device)
            rows += found
            keep(setting, rows)
            rows.append({"what": "fit", "encoder": encoder, "checkpointed": checkpointed} | largest_batches(found))
    return rows


def largest_batches(rows: Rows) -> dict[str, Any]:
    """Straight line through peak memory over batch, and the largest multiple of 8 that fits each of CARDS.

    Args:
        rows: of `step_speed.measure` at two or more batches (otherwise there is no line).
    """
    points = [(row["batch"], row["reserved_gib"]) for row in rows if row["status"] == "ok" and row["reserved_gib"] > 0]
    if len(points) < 2:
        return {"status": "not run", "reason": "needs peak memory at two batches on a GPU"}
    n, sx, sy = len(points), sum(x for x, _ in points), sum(y for _, y in points)
    slope = (n * sum(x * y for x, y in points) - sx * sy) / (n * sum(x * x for x, _ in points) - sx * sx)
    base = (sy - slope * sx) / n
    largest = {str(card): max(0, int((USABLE * card - base) / slope) // 8 * 8) for card in CARDS}
    return {"status": "ok", "gib_at_0": base, "gib_an_image": slope, "largest_batch": largest}
