"""Pieces that measure speed: operations, data path, whole steps, parts, kernels, memory."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import ops as bench_ops
from bench import step as bench_step
from bench.gpu.recipes import configured, recipe
from bench.gpu.setting import Rows, Setting, encoders
from bench.gpu.words import words
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.measure.running import OurStep, exact_or_fast, made_up_batches, release, with_batch
from rcmstr_fast.measure.step import line, measure
from rcmstr_fast.train.distributed import World

#: Capacities in GiB of the table of largest batches, and the share of each that a run may take.
CARDS, USABLE = (12, 24, 40, 80, 140), 0.94
#: How the masked pass of a CNN may be ordered to run.
MASKED = ("dense", "sparse")


@contextmanager
def masked_stages(order: str) -> Iterator[None]:
    """Order the stages of the masked pass to be dense or sparse while entered; empty: as the package decides."""
    name = "RCMSTR_FAST_MASKED_STAGES"
    before = os.environ.get(name)
    if order:
        os.environ[name] = order
    try:
        yield
    finally:
        if order and before is None:
            del os.environ[name]
        elif before is not None:
            os.environ[name] = before


def operations(setting: Setting, only: Iterable[str]) -> Rows:
    """The entries of bench.ops whose name contains one of `only`."""
    torch.set_float32_matmul_precision("high")  # TF32 for the baselines, which they would use in training
    rows: Rows = []
    size = "tiny" if setting.dry else "gpu"
    for subject in bench_ops.chosen(size, only):
        for row in bench_ops.rows(subject, setting.device, setting.choose(10, 2)):
            rows.append(row)
            setting.keep(rows)
            print(bench_ops.line(row), flush=True)
        release(setting.torch_device)
    return rows


def data_path(setting: Setting) -> Rows:
    """Rates of the data path, its stages and their peers over rendered words."""
    from bench import data
    from rcmstr_fast.measure import pipeline

    values = recipe(setting, "resnet29")
    values["data.roots"] = [str(words(setting, "speed", setting.choose(20_000, 16), 0))]
    config = configured(values, setting.changes)
    report = pipeline.measure(config, seconds=setting.choose(20.0, 0.1), repetitions=setting.choose(5, 1))
    rates = {name: vars(rate) for name, rate in report.stages.items()}
    sides = {name: getattr(report, name) for name in ("data", "model", "both", "wait_percent")}
    rows: Rows = [{"what": "rates", "images_per_s": sides, "stages": rates, "verdict": report.verdict}]
    return rows + data.peers(pipeline.sample(config), setting.choose(5, 1))


def steps(
    setting: Setting,
    encoder: str,
    providers: list[str],
    batches: tuple[int, ...],
    method: str = "rcmstr",
    masked: Iterable[str] = ("",),
) -> Rows:
    """Whole steps of ours and of other providers at several batches.

    Args:
        setting: of the run.
        encoder: of the configuration.
        providers: other than ours; they run with the first of `masked` only, as they have no sparse pass.
        batches: images a step.
        method: of the configuration.
        masked: how the masked pass is ordered to run, of MASKED; empty: as the package decides.
    """
    rows: Rows = []
    encoder = setting.choose(encoder, encoder.replace("small", "tiny"))
    world, rounds = World(setting.torch_device), setting.choose(20, 2)
    for batch in setting.choose(batches, (4,)):
        config = configured(recipe(setting, encoder, method, batch), setting.changes)
        for number, order in enumerate(masked):
            others = bench_step.factories([] if number else providers)
            try:
                with masked_stages(order):
                    found = measure(config, world, others, rounds)
            except torch.cuda.OutOfMemoryError:
                found = [{"provider": "ours", "encoder": encoder, "batch": batch, "status": "out of memory"}]
            found = [row | {"masked": order} if order and row["provider"] == "ours" else row for row in found]
            rows += found
            release(setting.torch_device)
            setting.keep(rows)
            for row in found:
                print(line(row) if "ms" in row else row, flush=True)
    return rows


def switches(setting: Setting) -> Rows:
    """Ours with every combination of graph and compile, CNN and ViT."""
    rows: Rows = []
    for encoder in encoders(setting):
        for graph in setting.choose(("on", "off"), ("off",)):
            for compiled in setting.choose(("off", "on"), ("off",)):
                config = configured(recipe(setting, encoder, cuda_graph=graph, compile=compiled), setting.changes)
                try:
                    rows += measure(config, World(setting.torch_device), {}, setting.choose(20, 2))
                except RuntimeError as error:
                    wrong = {"status": "failed", "reason": str(error)[:300]}
                    rows.append({"encoder": encoder, "switches": {"cuda_graph": graph, "compile": compiled}} | wrong)
                release(setting.torch_device)
                setting.keep(rows)
    return rows


def parts(setting: Setting) -> Rows:
    """Every part of the step of ours and of the eager baseline, and where the kernels' time goes."""
    rows: Rows = []
    for encoder in encoders(setting):
        config = configured(recipe(setting, encoder), setting.changes)
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
            config = configured(recipe(setting, encoder, checkpoint_activations=checkpointed), setting.changes)
            found: Rows = []
            for batch in setting.choose((128, 256, 512), (4,)):
                made = measure(with_batch(config, batch), World(setting.torch_device), {}, setting.choose(3, 1))
                found += [row | {"checkpointed": checkpointed} for row in made]
                release(setting.torch_device)
            rows += found
            setting.keep(rows)
            rows.append({"what": "fit", "encoder": encoder, "checkpointed": checkpointed} | largest_batches(found))
    return rows


def largest_batches(rows: Rows) -> dict[str, Any]:
    """Straight line through peak memory over batch, and the largest multiple of 8 that fits each of CARDS.

    Args:
        rows: of `measure.step.measure` at two or more batches (otherwise there is no line).
    """
    points = [(row["batch"], row["reserved_gib"]) for row in rows if row["status"] == "ok" and row["reserved_gib"] > 0]
    if len(points) < 2:
        return {"status": "not run", "reason": "needs peak memory at two batches on a GPU"}
    n, sx, sy = len(points), sum(x for x, _ in points), sum(y for _, y in points)
    slope = (n * sum(x * y for x, y in points) - sx * sy) / (n * sum(x * x for x, _ in points) - sx * sx)
    base = (sy - slope * sx) / n
    largest = {str(card): max(0, int((USABLE * card - base) / slope) // 8 * 8) for card in CARDS}
    return {"status": "ok", "gib_at_0": base, "gib_an_image": slope, "largest_batch": largest}
