"""`rcmstr bench pipeline|step|methods|ops`: what the data path and the training step of a recipe deliver here."""

import importlib
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace

import rcmstr_fast
from rcmstr_fast import recipe_files
from rcmstr_fast.cli.arguments import Parser, add_pretraining, to_pretraining
from rcmstr_fast.config import ConfigError, PretrainConfig, resolve
from rcmstr_fast.fields import Bounds

if TYPE_CHECKING:
    from rcmstr_fast.measure.records import Row
    from rcmstr_fast.train.distributed import World

NAME = "bench"
HELP = "measure the data path and the training step, and the single operations"
_RENDERED = 2048


def add_arguments(parser: Parser) -> None:
    """The sub-commands."""
    commands = parser.add_subcommands()
    make = type(parser)

    pipeline = make(description="Measure data only, model only and both, and each stage of the data path.")
    pipeline.add_argument(
        "--seconds", type=float, default=10.0, bounds=Bounds(above=0), help="length of each of the three measurements"
    )
    pipeline.add_argument(
        "--repetitions", type=int, default=5, bounds=Bounds(low=1), help="timed calls of each stage; the best counts"
    )
    pipeline.add_argument("--peers", type=bool, default=False, help="also time other libraries (needs a checkout)")
    pipeline.add_argument(
        "--out", type=str, default="bench/results", help="file (x.json) or folder of the JSON; empty: none"
    )
    add_pretraining(pipeline, parser.given)
    commands.add_subcommand("pipeline", pipeline, help="data path, training step, and which of them is the slower")

    step = make(description="Time whole training steps against plain PyTorch and their floor; see docs/performance.md.")
    step.add_argument(
        "--providers",
        type=str,
        default="ours,eager",
        help="of ours, eager, compile, compile_max (torch.compile max-autotune); all but ours need a checkout",
    )
    step.add_argument(
        "--batches", type=str, default="", help="images a step, a list such as 128,512; empty: the recipe's"
    )
    step.add_argument("--repetitions", type=int, default=10, bounds=Bounds(low=1), help="timed steps of each")
    step.add_argument("--parts", type=bool, default=False, help="also time every part of the step (needs a checkout)")
    step.add_argument(
        "--compare", type=str, default="", help="JSON of an earlier run; exit status 1 where it was faster"
    )
    step.add_argument(
        "--margin", type=float, default=0.05, bounds=Bounds(low=0), help="how much slower is still the same, as a share"
    )
    step.add_argument(
        "--out", type=str, default="bench/results", help="file (x.json) or folder of the JSON; empty: none"
    )
    add_pretraining(step, parser.given)
    commands.add_subcommand("step", step, help="whole training steps against plain PyTorch, images/s, memory")

    every = make(description="Time the whole step of every recipe against plain PyTorch (needs a checkout).")
    every.add_argument(
        "--recipes", type=str, default="tiny_", help="recipes whose names begin so; all methods have one"
    )
    every.add_argument("--batch", type=int, default=0, bounds=Bounds(low=0), help="images a step; 0: each recipe's own")
    every.add_argument("--precision", type=Literal["auto", "fp32", "bf16"], default="fp32", help="of all of them")
    every.add_argument(
        "--repetitions", type=int, default=10, bounds=Bounds(low=1), help="timed steps of each, ours and plain in turn"
    )
    every.add_argument(
        "--out", type=str, default="bench/results", help="file (x.json) or folder of the JSON; empty: none"
    )
    commands.add_subcommand("methods", every, help="the step of every method against plain PyTorch, in one record")

    single = make(description="Time the operations against their peers (needs a checkout).")
    single.add_argument("--only", type=str, default="", help="only entries whose operation and shape contain this text")
    single.add_argument("--repetitions", type=int, default=10, bounds=Bounds(low=1), help="timed calls of each")
    single.add_argument("--out", type=str, default="bench/results", help="file (x.json) or folder of the JSON")
    commands.add_subcommand("ops", single, help="the single operations against their peers")


def run(namespace: Namespace) -> int:
    """Run the chosen sub-command; the exit status."""
    commands = {"pipeline": _pipeline, "step": _step, "methods": _methods, "ops": _ops}
    return commands[namespace.subcommand](namespace[namespace.subcommand])


def _methods(arguments: Namespace) -> int:
    """Steps of every recipe; status 1 where the two sides disagree about a loss."""
    from rcmstr_fast.measure import records, step
    from rcmstr_fast.train.distributed import joined

    names = [name for name in recipe_files.names() if name.startswith(arguments.recipes)]
    if not names:
        raise ConfigError(f"recipes must begin a name that `rcmstr recipes` lists, got {arguments.recipes!r}")
    bench, rows, path = _checkout("step"), [], None
    with joined("auto") as world:
        for found in bench.method_rows(names, world, arguments.batch, arguments.precision, arguments.repetitions):
            rows += found
            for row in found:
                print(step.line(row), flush=True)
            if arguments.out:  # anew after each recipe: a measurement that is stopped leaves what it has
                path = records.write(Path(arguments.out), records.name_with_version("methods"), records.record(rows))
    if path:
        print(path)
    return int(any(row["status"] != "ok" for row in rows))


def _ops(arguments: Namespace) -> int:
    words = ["--only", arguments.only, "--repetitions", str(arguments.repetitions), "--out", arguments.out]
    return _checkout("ops.__main__").main(words)


def _pipeline(arguments: Namespace) -> int:
    config = to_pretraining(arguments)
    bench = _checkout("data") if arguments.peers else None
    from rcmstr_fast.measure import pipeline

    with ExitStack() as stack:
        if not config.data.roots:
            config.data.roots = [str(rendered(stack))]
        report = pipeline.measure(resolve(config), seconds=arguments.seconds, repetitions=arguments.repetitions)
        print(pipeline.text(report))
        rows = bench.peers(pipeline.sample(config), arguments.repetitions) if bench else []
        for row in rows:
            print(pipeline.line(row))
    facts = {"seconds": arguments.seconds, "report": asdict(report), "verdict": report.verdict}
    _write(arguments.out, "pipeline", config, rows, **facts)
    return 0


def _step(arguments: Namespace) -> int:
    from rcmstr_fast.measure import records, step
    from rcmstr_fast.train.distributed import joined

    config = resolve(to_pretraining(arguments))
    batches = _numbers(arguments.batches) or [config.train.global_batch_size or 0]
    others = [name for name in (word.strip() for word in arguments.providers.split(",")) if name != "ours"]
    bench = _checkout("step") if others or arguments.parts else None
    old = records.rows_of(records.read(Path(arguments.compare))) if arguments.compare else []
    with joined(config.train.device) as world:
        rows: list[Row] = []
        for batch in batches:
            rows += _of_batch(config, batch, world, bench, others, arguments)
        if world.rank > 0:
            return 0
    _write(arguments.out, "step", config, rows)
    slower = step.compare(old, rows, arguments.margin) if old else []
    print("\n".join(f"slower than {arguments.compare}: {line}" for line in slower))
    return int(bool(slower) or any(row["status"] == "FAIL" for row in rows))


def _of_batch(
    config: PretrainConfig,
    batch: int,
    world: "World",
    bench: ModuleType | None,
    others: list[str],
    arguments: Namespace,
) -> "list[Row]":
    """Rows of one batch, printed by the first process."""
    from rcmstr_fast.measure import running, step

    chosen = running.with_batch(config, batch)
    factories = bench.factories(others) if bench else {}
    rows = step.measure(chosen, world, factories, arguments.repetitions)
    if bench and arguments.parts:
        rows += bench.part_rows(chosen, others, world, arguments.repetitions)
    for row in rows if world.rank == 0 else ():
        print(step.line(row), flush=True)
    return rows


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise ConfigError(f"batches must be whole numbers with commas between, got {text!r}") from error


def _checkout(name: str) -> ModuleType:
    """A module of the checkout's `bench` folder, which is no part of the installed package."""
    root = Path(rcmstr_fast.__file__).resolve().parents[1]
    if not (root / "bench" / "__init__.py").is_file():
        raise ConfigError(f"expected a checkout of the repository with its folder bench, got {root}")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module(f"bench.{name}")
    except ImportError as error:
        raise ConfigError(f"bench/{name} cannot be used: {error}; pip install 'rcmstr-fast[test]'") from error


def rendered(stack: ExitStack) -> Path:
    """A folder of rendered words that is gone when `stack` is left."""
    from rcmstr_fast.data.synth import SynthConfig, render_lmdb

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "words"
    print(f"data.roots is empty: {_RENDERED} words are rendered for the measurement", file=sys.stderr)
    return Path(render_lmdb(SynthConfig(out=str(folder), count=_RENDERED)))


def _write(where: str, name: str, config: PretrainConfig, rows: "list[Row]", **facts: Any) -> None:
    """Leave a record in a folder or a file, unless `where` is empty."""
    if not where:
        return
    from rcmstr_fast.measure import records

    made = records.record(rows, config=asdict(config), **facts)
    print(records.write(Path(where), records.name_with_version(name), made))
