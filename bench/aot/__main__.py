"""Compile every shipped Triton kernel ahead of time, without a GPU, and hold the result against a committed table.

    python -m bench.aot                 check against bench/results/aot/triton-<version>.json
    python -m bench.aot --write         write that table
    python -m bench.aot --model         predict times from the compiled code: bench/results/aot/model.json

`--only TEXT` takes just the configurations whose name matches the regular expression, `--missing` those that the table
lacks; `--jobs N` compiles N at a time. A table may lack rows (what has not been compiled with that Triton, or has a
fault), but holds none that is no longer shipped.

What a configuration must satisfy whatever the table says: no stack and no local-memory traffic (a register count alone
proves nothing: ptxas reports 32 registers for kernels that live on the stack), shared memory and registers of
`resident` programs within the multiprocessor of its architecture, the tensor-core instruction of the architecture, no
asynchronous products that ptxas serialises, and a pipelined loop with the buffers it asks for.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench.aot.build import build, triton
from bench.aot.gate import faults
from rcmstr_fast.kernels.shipped import Configuration, configurations

TABLES = Path(__file__).parents[1] / "results" / "aot"


def table_path() -> Path:
    """The committed table of the Triton that is installed."""
    return TABLES / f"triton-{triton.__version__}.json"


def _row(name: str) -> tuple[dict[str, int], str]:
    """The row of a configuration, or why it does not compile."""
    configuration = next(c for c in configurations() if c.name == name)
    try:
        return build(configuration).row, ""
    except Exception as error:  # what the compilers raise is not one class
        return {}, f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"


def _rows(chosen: list[Configuration], jobs: int) -> Iterator[tuple[Configuration, dict[str, int], str]]:
    names = [c.name for c in chosen]
    if jobs == 1:
        yield from ((c, *_row(name)) for c, name in zip(chosen, names))
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from ((c, *found) for c, found in zip(chosen, pool.map(_row, names)))


def _keep(table: dict[str, dict[str, int]]) -> None:
    """Write the table whole: a stopped run keeps what it has compiled."""
    path = table_path()
    beside = path.with_suffix(".part")
    rows = (f"{json.dumps(name)}: {json.dumps(row, sort_keys=True)}" for name, row in sorted(table.items()))
    beside.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    os.replace(beside, path)


def check(options: argparse.Namespace) -> int:
    """Compile; print faults and differences; 1 where there is one."""
    committed = json.loads(table_path().read_text(encoding="utf-8")) if table_path().exists() else {}
    shipped = {c.name: c for c in configurations()}
    try:
        chosen = [c for c in shipped.values() if re.search(options.only, c.name)]
    except re.error as error:
        print(f"--only must be a regular expression, got {options.only!r}: {error}", file=sys.stderr)
        return 2
    if not chosen:
        print(f"--only must match the name of a shipped configuration, got {options.only!r}", file=sys.stderr)
        return 2
    chosen = [c for c in chosen if not (options.missing and c.name in committed)]
    kept = {name: row for name, row in committed.items() if name in shipped}
    problems, done = [], 0
    for configuration, found, failure in _rows(chosen, options.jobs):
        name, done = configuration.name, done + 1
        wrong = [failure] if failure else faults(configuration, found)
        problems += [f"{name}: {fault}" for fault in wrong]
        if options.write:
            kept.pop(name, None)
            if not wrong:
                kept[name] = found
            if done % 20 == 0:
                _keep(kept)
        elif not failure and any(found.get(key) != value for key, value in committed.get(name, {}).items()):
            problems.append(f"{name}: compiled to {found}, the table says {committed[name]}")
    if options.write:
        _keep(kept)
    else:
        problems += [f"{name}: in the table, no longer shipped" for name in sorted(set(committed) - set(shipped))]
    print("\n".join([*problems, f"triton {triton.__version__}: {done} configurations, {len(problems)} problems"]))
    return 1 if problems else 0


def main(arguments: list[str] | None = None) -> int:
    """Check, write or model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--write", action="store_true", help="write the table of the installed Triton version")
    parser.add_argument("--model", action="store_true", help="predict times from the compiled code")
    parser.add_argument("--only", default="", help="only configurations whose name matches this regular expression")
    parser.add_argument("--missing", action="store_true", help="only configurations that the table lacks")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    options = parser.parse_args(arguments)
    if options.model:
        from bench.aot import model

        return model.write(TABLES / "model.json")
    return check(options)


if __name__ == "__main__":
    sys.exit(main())
