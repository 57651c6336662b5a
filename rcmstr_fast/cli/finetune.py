"""`rcmstr finetune`: the same as `rcmstr probe`, with the encoder trained too."""

from rcmstr_fast.cli import probe
from rcmstr_fast.cli.arguments import Parser
from rcmstr_fast.evaluation.config import FinetuneConfig

NAME = "finetune"
HELP = "train encoder and decoder together and test them; run it again to continue"

run = probe.run


def add_arguments(parser: Parser) -> None:
    """Every field of ProbeConfig; mode is finetune unless it is given."""
    probe.add_arguments(parser, FinetuneConfig)
