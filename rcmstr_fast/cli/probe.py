"""`rcmstr probe`: a decoder over an encoder, trained and tested."""

import os

from jsonargparse import ArgumentParser, Namespace

from rcmstr_fast.cli.arguments import add_dataclass, to_dataclass
from rcmstr_fast.evaluation.config import ProbeConfig

NAME = "probe"
HELP = "train a decoder over a frozen encoder and test it; run it again to continue"


def add_arguments(parser: ArgumentParser) -> None:
    """Every field of ProbeConfig."""
    add_dataclass(parser, ProbeConfig)


def run(arguments: Namespace) -> int:
    """Train and test, or read a finished run, and print its table."""
    config = to_dataclass(ProbeConfig, arguments)
    from rcmstr_fast.evaluation.probe import probe
    from rcmstr_fast.evaluation.report import full_table

    result = probe(config)
    if os.environ.get("RANK", "0") == "0":
        print(full_table(result))
    return 0
