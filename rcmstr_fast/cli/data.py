"""`rcmstr data synth|convert|check|stats`: make and examine sets of word images."""

import json
import logging
import sys
from collections import Counter
from dataclasses import asdict

from jsonargparse import ArgumentParser, Namespace

from rcmstr_fast.cli.arguments import add_dataclass, to_dataclass
from rcmstr_fast.config import DataConfig
from rcmstr_fast.data.synth.config import SynthConfig

NAME = "data"
HELP = "render, convert, check and describe sets of word images"
_SHOWN = 10


def add_arguments(parser: ArgumentParser) -> None:
    """The four sub-commands."""
    commands = parser.add_subcommands()
    make = type(parser)

    synth = make(description="Render word images into an LMDB; needs no download.")
    add_dataclass(synth, SynthConfig)
    commands.add_subcommand("synth", synth, help="render word images into an LMDB")

    convert = make(description="Pack pictures and a list of labels into an LMDB.")
    convert.add_argument(
        "source", help="folder or .zip with labels.tsv or gt.txt (lines: file, tab, label; UTF-8) and the pictures"
    )
    convert.add_argument("out", help="LMDB folder to make; must be new or empty")
    commands.add_subcommand("convert", convert, help="pack pictures and labels into an LMDB")

    check = make(description="Decode every image and name the broken ones; exit status 1 if there are any.")
    _add_roots(check)
    limits = DataConfig()
    check.add_argument(
        "--max_pixels", type=int, default=limits.max_pixels, help="larger pictures are broken (width x height)"
    )
    check.add_argument(
        "--min_side", type=int, default=limits.min_side, help="pictures with a shorter side are broken (pixels)"
    )
    commands.add_subcommand("check", check, help="decode every image and name the broken ones")

    stats = make(description="Number, sizes, labels and characters of every set.")
    _add_roots(stats)
    stats.add_argument("--charset", type=str, default="94", help="36, 62, 94 or a file: characters outside are listed")
    commands.add_subcommand("stats", stats, help="number, sizes, labels and characters of every set")


def _add_roots(parser: ArgumentParser) -> None:
    parser.add_argument("roots", nargs="+", type=str, help="LMDBs, folders that hold LMDBs, or folders of images")
    parser.add_argument("--threads", type=int, default=0, help="threads; 0: all CPUs of this process")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(namespace: Namespace) -> int:
    """Run the chosen sub-command; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    chosen = {"synth": _synth, "convert": _convert, "check": _check, "stats": _stats}[namespace.subcommand]
    return chosen(namespace[namespace.subcommand])


def _synth(arguments: Namespace) -> int:
    from rcmstr_fast.data.synth import render_lmdb

    config = to_dataclass(SynthConfig, arguments)
    out = render_lmdb(config)
    print(f"{out}: {config.count} crops")
    return 0


def _convert(arguments: Namespace) -> int:
    from rcmstr_fast.data.convert import convert

    report = convert(arguments.source, arguments.out)
    print(f"{report.out}: {report.written} images, {report.unlabelled} of them without a label")
    for reason, names in report.problems.items():
        print(f"left out, {reason}: {len(names)}")
        for name in names[:_SHOWN]:
            print(f"  {name}")
        if len(names) > _SHOWN:
            print(f"  and {len(names) - _SHOWN} more")
    if report.unlisted:
        print(f"pictures that the list does not name: {report.unlisted}")
    return 0


def _check(arguments: Namespace) -> int:
    from rcmstr_fast.data.check import check
    from rcmstr_fast.data.source import open_sources

    report = check(
        open_sources(arguments.roots),
        max_pixels=arguments.max_pixels,
        min_side=arguments.min_side,
        threads=arguments.threads,
    )
    if arguments.json:
        print(json.dumps(asdict(report), indent=1, ensure_ascii=False))
    else:
        for name, reason in report.broken:
            print(f"{name}: {reason}")
        print(f"{report.total} images, {len(report.broken)} broken")
        for reason, count in Counter(reason for _, reason in report.broken).most_common(_SHOWN):
            print(f"  {count} x {reason}")
    return 1 if report.broken else 0


def _stats(arguments: Namespace) -> int:
    from rcmstr_fast.data.check import set_stats, stats_table
    from rcmstr_fast.data.source import open_sources

    source = open_sources(arguments.roots)
    stats = [set_stats(found, arguments.charset, arguments.threads) for found in source.sets]
    print(
        json.dumps([asdict(one) for one in stats], indent=1, ensure_ascii=False)
        if arguments.json
        else stats_table(stats)
    )
    return 0
