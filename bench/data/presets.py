"""Benchmark of the presets of `augment_views` beside the same views with NumPy, SciPy and Pillow on the CPU.

    python -m bench.data.presets [--repetitions N] [--batch N] [--out FOLDER]

Both make the same views from the same rows of parameters; the peer's are compared with ours before it is timed. Rates
are views a second of one process, the best of the repetitions, which take turns; `per_core` divides by processor time.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.data import chain
from rcmstr_fast.measure import records
from rcmstr_fast.measure.pipeline import interleaved
from rcmstr_fast.ops import augment_views
from rcmstr_fast.ops.augment_views import PRESETS, compiled, presets

SIZE = (32, 100)
#: Pictures of the peer a repetition, and the largest mean difference from ours in grey levels.
FEW, NEAR = 32, 1.0


def pictures(count: int) -> torch.Tensor:
    """Smooth random pictures [count, 32, 100, 3] uint8."""
    small = torch.rand(count, 3, 8, 20, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(small, SIZE, mode="bicubic").clamp(0, 1) * 255
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def rows_of(name: str, batch: int, repetitions: int) -> list[dict[str, Any]]:
    """Rates of two views of a batch by the preset `name`, ours and the peer's."""
    images, index = pictures(batch), torch.arange(batch)
    parameters = compiled.draw(index, 0, 0, presets.views_of(name, 2)).numpy()
    few = images[:FEW].numpy()

    def ours() -> int:
        augment_views(images, seed=0, epoch=0, index=index, num_views=2, size=SIZE, preset=name)
        return 2 * batch

    def peer() -> int:
        return len([chain.augment_image(p, row) for view in parameters for p, row in zip(few, view)])

    made = np.stack([chain.augment_image(p, row) for p, row in zip(few, parameters[0])])
    views = augment_views(images, seed=0, epoch=0, index=index, num_views=2, size=SIZE, preset=name)
    error = np.abs(made - views[0, : len(few)].permute(0, 2, 3, 1).numpy()).mean() * 127.5
    runs = {"ours": ours} | ({"numpy, scipy, pillow": peer} if error <= NEAR else {})
    rates = interleaved(runs, repetitions)
    found = [
        {
            "operation": "augment_views",
            "shape": f"{name} {SIZE[0]}x{SIZE[1]}",
            "provider": provider,
            "status": "ok",
            "views_per_s": rate.images_per_s,
            "per_core": rate.per_core,
            "mean_error": float(error),
        }
        for provider, rate in rates.items()
    ]
    failed = {"operation": "augment_views", "shape": name, "provider": "numpy, scipy, pillow", "status": "FAIL"}
    return found if len(runs) > 1 else [*found, failed | {"mean_error": float(error)}]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and write its JSON; 1 where a peer makes other views."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder of the JSON")
    options = parser.parse_args(arguments)
    rows = []
    for name in PRESETS:
        rows += rows_of(name, options.batch, options.repetitions)
        for row in rows[-2:]:
            rate = f"{row['views_per_s']:10.0f} views/s {row['per_core']:10.0f} a core" if row["status"] == "ok" else ""
            print(f"{name:<10} {row['provider']:<22} {row['status']} {rate} error {row['mean_error']:.3f}", flush=True)
    print(records.write(options.out, records.name_with_version("augment"), records.record(rows)))
    return int(any(row["status"] == "FAIL" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
