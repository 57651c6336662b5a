"""`rcmstr probe`: a decoder over an encoder, trained and tested."""

import os

from jsonargparse import Namespace

from rcmstr_fast.cli.arguments import Parser, add_dataclass, to_dataclass
from rcmstr_fast.evaluation.config import ProbeConfig
from rcmstr_fast.fields import Bounds

NAME = "probe"
HELP = "train a decoder over a frozen encoder and test it; run it again to continue"


def add_arguments(parser: Parser, cls: type[ProbeConfig] = ProbeConfig) -> None:
    """Every field of ProbeConfig; several subsets or seeds make a grid of runs."""
    add_dataclass(parser, cls, skip={"subset"})
    parser.add_argument(
        "--subset",
        type=float | list[float],
        default=1.0,
        bounds=Bounds(above=0, high=1),
        help="share of the training words that is used; several (0.01 0.1 1) make a grid of runs",
    )
    parser.add_argument(
        "--seeds",
        type=int | list[int],
        default=[],
        bounds=Bounds(low=0),
        help="seeds of a grid of runs (0 1 2); empty: seed alone",
    )
    parser.spread = ("--subset", "--seeds")


def run(arguments: Namespace) -> int:
    """Train and test, or read finished runs, and print their table."""
    subsets, seeds = (x if isinstance(x, list) else [x] for x in (arguments.subset, arguments.seeds))
    arguments.subset = subsets[0] if subsets else 1.0
    config = to_dataclass(ProbeConfig, arguments)
    if seeds or len(subsets) != 1:
        from rcmstr_fast.evaluation.grid import run_grid

        text = run_grid(config, subsets, seeds or [config.seed])
    else:
        from rcmstr_fast.evaluation.probe import probe
        from rcmstr_fast.evaluation.report import full_table

        text = full_table(probe(config))
    if os.environ.get("RANK", "0") == "0":
        print(text)
    return 0
