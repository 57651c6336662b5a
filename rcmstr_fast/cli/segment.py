"""`rcmstr segment`: text segmentation over an encoder, trained and tested."""

import os

from jsonargparse import Namespace

from rcmstr_fast.cli.arguments import Parser, add_dataclass, to_dataclass
from rcmstr_fast.evaluation.config import SegmentConfig

NAME = "segment"
HELP = "train a segmentation of text over an encoder and test it; run it again to continue"


def add_arguments(parser: Parser) -> None:
    """Every field of SegmentConfig."""
    add_dataclass(parser, SegmentConfig)


def run(arguments: Namespace) -> int:
    """Train and test, or read a finished run, and print its table."""
    from rcmstr_fast.evaluation.segment import segment
    from rcmstr_fast.evaluation.segment_report import segment_table

    result = segment(to_dataclass(SegmentConfig, arguments))
    if os.environ.get("RANK", "0") == "0":
        print(segment_table(result))
    return 0
