"""Benchmark of the operations and the masked pass: operation x provider x mode x shape, one record.

    python -m bench.ops [--only TEXT] [--repetitions N] [--size tiny|cpu|gpu] [--out FOLDER]

On a GPU the shapes are those of batches 256, 512 and 1024; on a CPU small ones, for ratios within one run only.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench.ops import chosen, line, rows
from bench.ops.subjects import SIZES
from rcmstr_fast.measure import machine, records


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and write its record; 1 where one of our own providers failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="", help="only subjects whose name contains this text")
    parser.add_argument("--repetitions", type=int, default=10, help="timed calls of each provider and mode")
    parser.add_argument("--size", choices=SIZES, default=None, help="default: gpu where torch finds one, else cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the record")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = options.size or ("gpu" if device == "cuda" else "cpu")
    torch.set_float32_matmul_precision("high")  # TF32 for the baselines, which they would use in training
    found, about, path = [], machine.describe(), None
    for subject in chosen(size, [options.only]):
        for row in rows(subject, device, options.repetitions):
            found.append(row)
            print(line(row), flush=True)
        name = records.name_with_version("ops")
        path = records.write(options.out, name, records.record(found, about=about))  # what follows may be stopped
    print(path or f"bench.ops: no subject contains {options.only!r}")
    return int(path is None or any(row["provider"] in ("ours", "sparse") and row["status"] != "ok" for row in found))


if __name__ == "__main__":
    sys.exit(main())
