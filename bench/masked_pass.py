"""Benchmark of the masked pass: a residual block of each stage, and the whole ResNet-29, sparse against dense x mask.

    python -m bench.masked_pass [--batch N] [--widths W ..] [--ratios R ..] [--dtypes float32 bfloat16] [--out FOLDER]

Forward and backward with batch norm, mask unit stage3; channels_last and one copy of the weights in the dtype of
autocast, as in training. The two ways run in turn, so that a busy machine meets both; the
ratio is that of their best times, and only ratios within one run mean anything on a CPU. A way whose features are off
prints FAIL and is not timed. The break-even that follows is what `ops.masked.storage.LARGEST_PACKED_SHARE` should hold.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import rcmstr_fast
from bench import timing
from rcmstr_fast import ops
from rcmstr_fast.models.resnet import BasicBlock, ResNet29
from rcmstr_fast.models.working_weights import WorkingWeights

#: (name, height and width of the maps, channels at width 1)
STAGES = (("32x100", (32, 100), 64), ("16x50", (16, 50), 128), ("8x25", (8, 25), 256), ("4x26", (4, 26), 512))
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
Way = Callable[[str], torch.Tensor]


def masks_of(batch: int, ratio: float, device: str) -> ops.Masks:
    """Masks of one batch at a mask ratio; the block is part of the pretraining default."""
    index = torch.arange(batch, device=device)
    size = {"size": (32, 100), "unit": "stage3", "num_blocks": 0}
    return ops.draw_masks(index, seed=0, epoch=0, mask_ratio=ratio, **size)


def trained_form(model: torch.nn.Module, dtype: torch.dtype, device: str) -> WorkingWeights:
    """Bring a model to the device as training does; the shared copies of its weights (none in float32)."""
    weights = WorkingWeights(
        model.to(device, memory_format=torch.channels_last), None if dtype == torch.float32 else dtype
    )
    weights.refresh()
    return weights


def block_pass(channels: int, size: tuple[int, int], batch: int, ratio: float, dtype: torch.dtype, device: str) -> Way:
    """Forward and backward of one residual block at a stage."""
    torch.manual_seed(0)
    block = BasicBlock(channels, channels)
    weights = trained_form(block, dtype, device)
    grid, sizes = masks_of(batch, ratio, device).grid, [(32, 100), (16, 50), (8, 25), (4, 26)]
    stage = ops.active_sites(grid, sizes)[sizes.index(size)]._replace(source=None)
    images = torch.randn(batch, channels, *size, device=device).to(memory_format=torch.channels_last)

    def run(order: str) -> torch.Tensor:
        (sites,) = ops.masked_storage([stage], backend=order)
        # A block inside a stage gets what its storage gives: the conversion is not part of it.
        x = sites.take_in(images, None) if getattr(sites, "kept", False) else images
        x = x.detach().requires_grad_()
        with weights.shared():
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                y = block(x, sites)
            y.float().square().sum().backward()  # where inactive, y may hold anything: it reaches the loss alone
        return ops.unpack_sites(y.detach(), sites)

    return run


def whole_pass(width: float, batch: int, ratio: float, dtype: torch.dtype, device: str) -> Way:
    """Forward and backward of the encoder's masked pass, site lists included."""
    torch.manual_seed(0)
    model, masks = ResNet29(width), masks_of(batch, ratio, device)
    weights = trained_form(model, dtype, device)
    images = torch.randn(batch, 3, 32, 100, device=device).to(memory_format=torch.channels_last)

    def run(order: str) -> torch.Tensor:
        with weights.shared():
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                features, _ = model.forward_masked(images, masks, "anchored")
            features.float().square().sum().backward()
        return features.detach()

    return run


def ordered(way: Way, order: str) -> torch.Tensor:
    """Run a way with RCMSTR_FAST_BACKEND set."""
    os.environ["RCMSTR_FAST_BACKEND"] = order
    try:
        return way(order)
    finally:
        del os.environ["RCMSTR_FAST_BACKEND"]


def compare(way: Way, ours: str, dtype: torch.dtype, repetitions: int, device: str) -> dict[str, Any]:
    """Best and median times of dense x mask and of `ours`, in turn, and the ratio of the best."""
    dense, sparse = (ordered(way, order).double() for order in ("reference", ours))
    error = float((sparse - dense).norm() / dense.norm().clamp(min=1e-12))
    if not error <= TOLERANCE[dtype]:
        return {"status": "FAIL", "error": error}
    times: dict[str, list[float]] = {"reference": [], ours: []}
    for _ in range(repetitions):
        for order, found in times.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            ordered(way, order)
            if device == "cuda":
                torch.cuda.synchronize()
            found.append(1e3 * (time.perf_counter() - start))
    best = {order: min(found) for order, found in times.items()}
    median = {order: sorted(found)[len(found) // 2] for order, found in times.items()}
    ratio = best["reference"] / best[ours]
    return {"status": "ok", "error": error, "ratio": ratio, "best_ms": best, "median_ms": median}


def rows(options: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    """One result a shape, dtype and mask ratio."""
    ours = "triton" if device == "cuda" else "cpp"
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for width in options.widths:
            for ratio in options.ratios:
                setting = (options.batch, ratio, dtype, device)
                ways = [(n, round(c * width), block_pass(round(c * width), s, *setting)) for n, s, c in STAGES]
                ways.append(("all", round(512 * width), whole_pass(width, *setting)))
                for stage, channels, way in ways:
                    head = {
                        "stage": stage,
                        "channels": channels,
                        "width": width,
                        "mask_ratio": ratio,
                        "dtype": str(dtype),
                    }
                    if options.only in stage:
                        yield head | compare(way, ours, dtype, options.repetitions, device)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and write its JSON; 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--widths", type=float, nargs="+", default=[0.25, 1.0], help="width multipliers")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.7], help="mask ratios")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="float32 and bfloat16 (autocast)")
    parser.add_argument("--only", default="", help="only stages whose name contains this text")
    parser.add_argument("--repetitions", type=int, default=5, help="timed calls of each way")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine, found, name = timing.describe(device), [], f"masked-pass-{rcmstr_fast.__version__}.json"
    for row in rows(options, device):
        found.append(row)
        timing.write_record(options.out, name, machine, found)  # what follows may be stopped
        detail = f"ratio {row['ratio']:5.2f}  {row['best_ms']}" if row["status"] == "ok" else f"FAIL {row['error']:.3g}"
        print(*(row[k] for k in ("stage", "channels", "mask_ratio", "dtype")), detail, flush=True)
    path = timing.write_record(options.out, name, machine, found)
    print(path)
    return int(any(row["status"] != "ok" for row in found))


if __name__ == "__main__":
    sys.exit(main())
