"""`rcmstr tune`: measure what a run may choose on this machine, show it, and keep it for the runs to come."""

from contextlib import ExitStack
from typing import Any

from jsonargparse import Namespace

from rcmstr_fast.cli.arguments import Parser, add_pretraining, to_pretraining
from rcmstr_fast.config import ConfigError, resolve
from rcmstr_fast.fields import Bounds

NAME = "tune"
HELP = "measure on this machine what a run may choose: storage, launches, threads, decoders"


def add_arguments(parser: Parser) -> None:
    """Every field of PretrainConfig, and what is measured for how long."""
    add_pretraining(parser)
    parser.add_argument("--again", type=bool, default=False, nargs="?", const=True, help="measure anew what is kept")
    parser.add_argument(
        "--seconds", type=float, default=90.0, bounds=Bounds(above=0), help="budget of all measurements together"
    )
    parser.add_argument("--only", type=list[str], default=[], help="only these choices: --only A B; empty: all")
    parser.words = ("--only",)


def run(arguments: Namespace) -> int:
    """Tune and print the table."""
    config = resolve(to_pretraining(arguments))
    only = list(arguments.only)
    from rcmstr_fast.train import tuned
    from rcmstr_fast.train.distributed import joined
    from rcmstr_fast.train.loop import trial_of
    from rcmstr_fast.train.plan import make_plan
    from rcmstr_fast.train.runfolder import RunFolder
    from rcmstr_fast.train.stream import Stream
    from rcmstr_fast.train.trainer import numerics
    from rcmstr_fast.tuning import choices, record
    from rcmstr_fast.tuning.engine import Outcome

    for name in only:
        if not name.startswith(choices.BACKEND):
            choices.named(name, [*choices.declared()])
    with ExitStack() as stack:
        world = stack.enter_context(joined(config.train.device))
        if world.world_size > 1:
            raise ConfigError(f"tune must run in one process, the first of a run tunes for all, got {world.world_size}")
        if not config.data.roots:
            from rcmstr_fast.cli.bench import rendered

            config.data.roots = [str(rendered(stack))]
        stack.enter_context(numerics(config))
        stream = Stream(config)
        plan = make_plan(config, stream.epoch_size, 1)
        key = tuned.key_of(config, plan, world)
        known: dict[str, Any] | None = record.read(world.device)["runs"].get(key)
        if known is not None and known.get("done") and not arguments.again and not only:
            print(table(known["rows"]))
            print(f"kept in {record.path()}; --again measures anew")
            return 0
        found = tuned.Findings(machine=record.machine(world.device))
        found.verdicts = tuned.check(again=arguments.again)
        print(tuned.summary(found), flush=True)

        def make() -> tuned.Trial:
            from rcmstr_fast.methods import build_method

            return trial_of(config, plan, world, RunFolder(config.run), build_method, stream)

        def report(outcome: Outcome) -> None:
            print(line(outcome.row()), flush=True)

        print(HEAD, flush=True)
        tuned.tune(found, key, world.device, make, arguments.seconds, only=only, report=report)
        print(f"measured in {found.seconds:.0f} s, kept in {record.path()}")
    return 0


HEAD = f"{'choice':<28} {'candidate':<24} {'ms':>10} {'spread':>19}"


def table(rows: list[dict[str, Any]]) -> str:
    """Kept rows for reading."""
    return "\n".join([HEAD, *map(line, rows)])


def line(row: dict[str, Any]) -> str:
    """The lines of one choice: its candidates, then what was chosen and the gain."""
    lines = []
    for name, times in row["times"].items():
        spread = f"{times['ms_25']:.1f} to {times['ms_75']:.1f}"
        mark = " <-" if name == row["shown"] else ""
        lines.append(f"{row['name']:<28} {name:<24} {times['ms']:10.1f} {spread:>19}{mark}")
    lines += [f"{row['name']:<28} {name:<24} {why}" for name, why in row["failed"].items()]
    return "\n".join([*lines, f"{row['name']:<28} chosen: {row['shown']}, {row['gain']:.2f}x ({row['why']})"])
