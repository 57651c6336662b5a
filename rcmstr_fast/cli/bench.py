"""`rcmstr bench pipeline|step|ops`: what the data path and the training step of a recipe deliver here."""

import importlib
import json
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from jsonargparse import Namespace

import rcmstr_fast
from rcmstr_fast.cli.arguments import Parser, add_pretraining, to_pretraining
from rcmstr_fast.config import ConfigError, resolve

NAME = "bench"
HELP = "measure the data path and the training step, and the single operations"
_RENDERED = 2048


def add_arguments(parser: Parser) -> None:
    """The sub-commands."""
    commands = parser.add_subcommands()
    make = type(parser)

    pipeline = make(description="Measure data only, model only and both, and each stage of the data path.")
    pipeline.add_argument("--seconds", type=float, default=10.0, help="length of each of the three measurements")
    pipeline.add_argument("--repetitions", type=int, default=5, help="timed calls of each stage; the best counts")
    pipeline.add_argument("--peers", type=bool, default=False, help="also time other libraries (needs a checkout)")
    pipeline.add_argument("--out", type=str, default="bench/results", help="folder of the JSON; empty: none")
    add_pretraining(pipeline, parser.given)
    commands.add_subcommand("pipeline", pipeline, help="data path, training step, and which of them is the slower")

    step = make(description="Time whole training steps against plain PyTorch and their floor; see docs/performance.md.")
    step.add_argument(
        "--providers", type=str, default="ours,eager",
        help="of ours, eager, compile, compile_max (torch.compile max-autotune); all but ours need a checkout",
    )  # fmt: skip
    step.add_argument(
        "--batches", type=str, default="", help="images a step, a list such as 128,512; empty: the recipe's"
    )
    step.add_argument("--repetitions", type=int, default=10, help="timed steps of each")
    step.add_argument("--parts", type=bool, default=False, help="also time every part of the step (needs a checkout)")
    step.add_argument(
        "--compare", type=str, default="", help="JSON of an earlier run; exit status 1 where it was faster"
    )
    step.add_argument("--margin", type=float, default=0.05, help="how much slower is still the same, as a share")
    step.add_argument("--out", type=str, default="bench/results", help="folder of the JSON; empty: none")
    add_pretraining(step, parser.given)
    commands.add_subcommand("step", step, help="whole training steps against plain PyTorch, images/s, memory")

    single = make(description="Time the operations against their peers (needs a checkout).")
    single.add_argument("--only", type=str, default="", help="only entries whose operation and shape contain this text")
    single.add_argument("--repetitions", type=int, default=10, help="timed calls of each")
    single.add_argument("--out", type=str, default="bench/results", help="folder of the JSON")
    commands.add_subcommand("ops", single, help="the single operations against their peers")


def run(namespace: Namespace) -> int:
    """Run the chosen sub-command; the exit status."""
    return {"pipeline": _pipeline, "step": _step, "ops": _ops}[namespace.subcommand](namespace[namespace.subcommand])


def _ops(arguments: Namespace) -> int:
    words = ["--only", arguments.only, "--repetitions", str(arguments.repetitions), "--out", arguments.out]
    return _checkout("ops").main(words)


def _pipeline(arguments: Namespace) -> int:
    if arguments.seconds <= 0 or arguments.repetitions < 1:
        raise ConfigError(
            f"seconds must be positive and repetitions 1 or more, got {arguments.seconds} and {arguments.repetitions}"
        )
    config = to_pretraining(arguments)
    bench = _checkout("pipeline") if arguments.peers else None
    from rcmstr_fast.train import throughput
    from rcmstr_fast.train.environment import environment

    with ExitStack() as stack:
        if not config.data.roots:
            config.data.roots = [str(_rendered(stack))]
        report = throughput.measure(resolve(config), seconds=arguments.seconds, repetitions=arguments.repetitions)
        print(_text(report))
        rows = bench.peers(throughput.sample(config), arguments.repetitions) if bench else []
        for row in rows:
            print(_row(row))
    record = {"environment": environment(), "config": asdict(config), "seconds": arguments.seconds}
    record |= {"report": asdict(report), "verdict": report.verdict, "peers": rows}
    if arguments.out:
        _write(Path(arguments.out), "pipeline", record)
    return 0


def _step(arguments: Namespace) -> int:
    from rcmstr_fast.train import step_speed
    from rcmstr_fast.train.distributed import joined
    from rcmstr_fast.train.environment import environment

    if arguments.repetitions < 1 or arguments.margin < 0:
        raise ConfigError(
            f"repetitions must be 1 or more and margin 0 or more, got {arguments.repetitions} and {arguments.margin}"
        )
    config = resolve(to_pretraining(arguments))
    names = [name.strip() for name in arguments.providers.split(",")]
    others = [name for name in names if name != "ours"]
    bench = _checkout("step") if others or arguments.parts else None
    old = _rows_of(arguments.compare)
    with joined(config.train.device) as world:
        rows: list[dict[str, Any]] = []
        for batch in _numbers(arguments.batches) or [config.train.global_batch_size]:
            chosen = step_speed.with_batch(config, batch)
            found = step_speed.measure(chosen, world, bench.factories(others) if bench else {}, arguments.repetitions)
            if bench and arguments.parts:
                found += bench.part_rows(chosen, others, world, arguments.repetitions)
            rows += found
            for row in found if world.rank == 0 else ():
                print(step_speed.line(row), flush=True)
        if world.rank > 0:
            return 0
    if arguments.out:
        record = {"environment": environment(), "config": asdict(config), "rows": rows}
        _write(Path(arguments.out), "step", record)
    slower = step_speed.compare(old, rows, arguments.margin) if old else []
    print("\n".join(f"slower than {arguments.compare}: {line}" for line in slower))
    return int(bool(slower) or any(row["status"] == "FAIL" for row in rows))


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise ConfigError(f"batches must be whole numbers with commas between, got {text!r}") from error


def _rows_of(path: str) -> list[dict[str, Any]]:
    if not path:
        return []
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"compare must name a JSON of `rcmstr bench step`, got {path} ({error})") from error


def _checkout(name: str) -> ModuleType:
    """A module of the checkout's `bench` folder, which is no part of the installed package."""
    root = Path(rcmstr_fast.__file__).resolve().parents[1]
    if not any((root / "bench" / file).is_file() for file in (f"{name}.py", f"{name}/__init__.py")):
        raise ConfigError(f"expected a checkout of the repository with bench/{name}, got an installed package")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module(f"bench.{name}")
    except ImportError as error:
        raise ConfigError(f"bench/{name} cannot be used: {error}; pip install 'rcmstr-fast[test]'") from error


def _rendered(stack: ExitStack) -> Path:
    from rcmstr_fast.data.synth import SynthConfig, render_lmdb

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "words"
    print(f"data.roots is empty: {_RENDERED} words are rendered for the measurement", file=sys.stderr)
    return Path(render_lmdb(SynthConfig(out=str(folder), count=_RENDERED)))


def _text(report: Any) -> str:
    lines = [f"{'stage':<10}{'images/s':>12}{'a core':>12}"]
    for name, rate in report.stages.items():
        lines.append(f"{name:<10}{rate.images_per_s:>12.0f}{rate.per_core:>12.0f}")
    for name in ("data", "model", "both"):
        lines.append(f"{name:<10}{getattr(report, name):>12.0f}")
    return "\n".join([*lines, f"{report.wait_percent:.1f} % of the training time is waiting for data", report.verdict])


def _row(row: dict[str, Any]) -> str:
    head = f"{row['stage']:<8} {row['provider']:<40}"
    if row["status"] != "ok":
        return f"{head} {row['status']}"
    return (
        f"{head} {row['images_per_s']:>10.0f} images/s {row['per_core']:>10.0f} a core, the first is "
        f"{row['ours_is']:.2f}x as fast, {row['ours_is_per_core']:.2f}x a core"
    )


def _write(folder: Path, name: str, record: dict[str, Any]) -> None:
    gpus = record["environment"]["gpus"]
    machine = (gpus[0]["name"] if gpus else "cpu").replace(" ", "-").lower()
    path = folder / machine / f"{name}-{rcmstr_fast.__version__}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(path)
