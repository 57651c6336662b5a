"""Benchmark of the operations: operation x provider x mode x shape, one JSON a machine and version.

    python -m bench.ops [--only TEXT] [--repetitions N] [--out FOLDER]

On a GPU the shapes are those of batches 256, 512 and 1024; on a CPU small ones, for ratios within one run only.
A provider whose results are off prints FAIL and is not timed; one that runs out of memory or raises says so.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import rcmstr_fast
from bench import queue_losses, small_ops, timing
from bench.queue_losses import Entry

VALUE, GRADIENT = 1e-3, 1e-2  # largest relative error of results and of gradients (norms) against float64


def entries(device: str) -> Iterator[Callable[[], Entry]]:
    """Builders of every entry for a device; one is alive at a time."""
    losses = queue_losses
    if device == "cuda":
        for batch in (512, 256, 1024):
            yield lambda b=batch: losses.five_terms("step", b, 65536, 128, device)  # type: ignore[misc]
            yield lambda b=batch: losses.relational_loss("frame", b * 26, 65536, 128, device)  # type: ignore[misc]
        for width in (64, 256, 512):
            yield lambda d=width: losses.relational_loss("frame", 13312, 65536, d, device)  # type: ignore[misc]
        yield lambda: losses.relational_loss("subword", 2048, 65536, 128, device)
        yield lambda: losses.relational_loss("word", 512, 65536, 128, device)
        yield lambda: losses.relation_kl("f2s", 16384, 65536, 128, device)
        yield lambda: losses.relation_kl("s2w", 2048, 65536, 128, device)
        yield lambda: losses.queue_cross_entropy("frame", 13312, 65536, 128, device)
        batch, keys = 512, 65536
    else:
        for keys in (1024, 4096):
            yield lambda k=keys: losses.relational_loss("demo frame", 26 * 64, k, 128, device)  # type: ignore[misc]
        yield lambda: losses.relational_loss("demo word", 64, 1024, 128, device)
        yield lambda: losses.relation_kl("demo f2s", 32 * 64, 1024, 128, device)
        yield lambda: losses.five_terms("demo step", 64, 1024, 128, device)
        batch, keys = 64, 4096
    yield lambda: small_ops.hierarchical_pool(batch, device)
    yield lambda: small_ops.project_levels(batch, device)
    yield lambda: small_ops.draw_masks(batch, device)
    yield lambda: small_ops.masked_mse(batch, device)
    yield lambda: small_ops.replace_tokens(batch, device)
    yield lambda: small_ops.enqueue(batch, keys, device)
    yield lambda: small_ops.momentum_update(47_000_000 if device == "cuda" else 3_000_000, device)


def error_of(found: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    """Relative error (norm over norm) of each result."""
    return [
        float((f.detach().double() - e).norm() / e.norm().clamp(min=1e-12))
        for f, e in zip(found, expected, strict=True)
    ]


def run_provider(
    entry: Entry, name: str, expected: list[torch.Tensor], device: str, repetitions: int
) -> Iterator[dict]:
    """Check one provider, then time its modes."""
    provider = entry.providers[name]
    base: dict[str, Any] = {"operation": entry.operation, "shape": entry.shape, "provider": name}
    try:
        if "unchecked" not in name:
            base["errors"] = error_of(provider(True), expected)
            limits = [VALUE if e.dim() == 0 else GRADIENT for e in expected]
            if not all(error <= limit for error, limit in zip(base["errors"], limits)):
                yield base | {"status": "FAIL"}
                return
        for mode, gradient in (("forward", False), ("forward and backward", True)):
            times = timing.measure(lambda gradient=gradient: provider(gradient), device, repetitions)  # type: ignore[misc]
            row = base | {"mode": mode, "status": "ok"} | times
            peak = next(
                (v for k, v in timing.PEAK_TFLOPS.items() if device == "cuda" and k in torch.cuda.get_device_name()), 0
            )
            if peak and entry.flops and gradient:
                row["share_of_floor"] = entry.flops / (peak * 1e9) / times["ms"]
            yield row
    except torch.cuda.OutOfMemoryError:
        yield base | {"status": "out of memory"}
    except Exception as error:  # a peer's failure is a result, not the end of the run
        yield base | {"status": f"{type(error).__name__}: {str(error)[:200]}"}


def line(row: dict[str, Any]) -> str:
    """One printed line of a result."""
    head = f"{row['operation']:<20} {row['shape']:<38} {row['provider']:<20}"
    if row["status"] != "ok":
        return f"{head} {row['status']} {row.get('errors', '')}"
    extra = "".join(f" {key} {row[key]:.3g}" for key in ("peak_mib", "share_of_floor") if key in row)
    return f"{head} {row['mode']:<21} {row['ms']:9.3f} ms [{row['ms_20']:.3f}, {row['ms_80']:.3f}]{extra}"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and write its JSON; 1 where one of our own providers failed its check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="", help="only entries whose operation and shape contain this text")
    parser.add_argument("--repetitions", type=int, default=10, help="timed calls a mode")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")  # TF32 for the baselines, which they would use in training
    machine, rows, name_of_record = timing.describe(device), [], f"{rcmstr_fast.__version__}.json"
    for build in entries(device):
        entry = build()
        if options.only not in f"{entry.operation} {entry.shape}":
            continue
        expected = entry.expected()
        for name in entry.providers:
            for row in run_provider(entry, name, expected, device, options.repetitions):
                rows.append(row)
                print(line(row), flush=True)
                timing.write_record(options.out, name_of_record, machine, rows)  # what follows may be stopped
    path = timing.write_record(options.out, name_of_record, machine, rows)
    print(path)
    return int(any(row["provider"] == "ours" and row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
