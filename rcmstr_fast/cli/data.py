"""`rcmstr data synth|convert|check|overlap|stats`: make and examine sets of word images."""

import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jsonargparse import Namespace

from rcmstr_fast.cli.arguments import Parser, add_dataclass, to_dataclass
from rcmstr_fast.config import ConfigError, DataConfig
from rcmstr_fast.data.lists import FORMATS
from rcmstr_fast.data.synth.config import SynthConfig
from rcmstr_fast.fields import Bounds

NAME = "data"
HELP = "render, convert, check and describe sets of word images"
_SHOWN = 10
#: As in `data.convert`, which is not imported for its names alone.
_FORMATS = ("lmdb", "textseg", "iam", "cvl", "rimes", "union14m", *FORMATS)


def add_arguments(parser: Parser) -> None:
    """The sub-commands."""
    commands = parser.add_subcommands()
    make = type(parser)

    synth = make(description="Render word images into an LMDB; needs no download.")
    add_dataclass(synth, SynthConfig)
    commands.add_subcommand("synth", synth, help="render word images into an LMDB")

    convert = make(description="Pack labelled pictures of many layouts into LMDBs (TextSeg: into patches with masks).")
    convert.add_argument(
        "source",
        help="folder or .zip with pictures and lists of labels, IAM, CVL, RIMES, Union14M-L or TextSeg; or LMDBs",
    )
    convert.add_argument("out", help="folder to make; must be new or empty")
    convert.add_argument(
        "--format", type=str, default="auto", help=f"auto (by content) or one of {', '.join(_FORMATS)}"
    )
    convert.add_argument(
        "--mend", action="store_true", help="mend labels: encoding to UTF-8, line ends, spaces around, Unicode form NFC"
    )
    convert.add_argument("--encoding", type=str, default="", help="of lists, and of labels to mend; empty: a guess")
    convert.add_argument("--lists", nargs="*", type=str, default=[], help="the lists of labels to read; default: all")
    convert.add_argument(
        "--split",
        choices=["auto", "writers", "none"],
        default="auto",
        help="parts: those that the set comes with, a random tenth of the writers for val and test (IAM, CVL), or none",
    )
    convert.add_argument("--keep_err", action="store_true", help="IAM: keep words whose segmentation is marked err")
    commands.add_subcommand("convert", convert, help="pack pictures and labels into an LMDB")

    check = make(description="Decode every image, look at every label; exit status 1 if anything is broken or faulty.")
    _add_roots(check)
    limits = DataConfig()
    check.add_argument(
        "--max_pixels",
        type=int,
        default=limits.max_pixels,
        bounds=Bounds(low=1),
        help="larger pictures are broken (width x height)",
    )
    check.add_argument(
        "--min_side",
        type=int,
        default=limits.min_side,
        bounds=Bounds(low=1),
        help="pictures with a shorter side are broken (pixels)",
    )
    commands.add_subcommand("check", check, help="decode every image, look at every label, name what is wrong")

    overlap = make(
        description="Pictures that several roots have in common, by content; exit status 1 if there are any."
    )
    _add_roots(overlap)
    commands.add_subcommand("overlap", overlap, help="find pictures that several roots have in common")

    stats = make(description="Number, sizes, labels and characters of every set.")
    _add_roots(stats)
    stats.add_argument(
        "--characters", type=str, default="", help="also write all characters of the labels: a charset file"
    )
    stats.add_argument("--protocol", type=str, default="exact", help="normalises the labels for --characters")
    stats.add_argument("--charset", type=str, default="94", help="36, 62, 94 or a file: characters outside are listed")
    commands.add_subcommand("stats", stats, help="number, sizes, labels and characters of every set")


def _add_roots(parser: Parser) -> None:
    parser.add_argument("roots", nargs="+", type=str, help="LMDBs, folders that hold LMDBs, or folders of images")
    parser.add_argument(
        "--threads", type=int, default=0, bounds=Bounds(low=0, high=1024), help="threads; 0: all CPUs of this process"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(namespace: Namespace) -> int:
    """Run the chosen sub-command; the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names are bytes: those that are not UTF-8 are shown as they are
            stream.reconfigure(errors="surrogateescape")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    chosen = {"synth": _synth, "convert": _convert, "check": _check, "overlap": _overlap, "stats": _stats}[
        namespace.subcommand
    ]
    return chosen(namespace[namespace.subcommand])


def _synth(arguments: Namespace) -> int:
    from rcmstr_fast.data.synth import render_lmdb

    config = to_dataclass(SynthConfig, arguments)
    out = render_lmdb(config)
    print(f"{out}: {config.count} crops")
    return 0


def _convert(arguments: Namespace) -> int:
    from rcmstr_fast.data.convert import convert
    from rcmstr_fast.data.imports.plan import Options

    form = "" if arguments.format == "auto" else arguments.format
    report = convert(
        arguments.source,
        arguments.out,
        Options(form, arguments.lists, arguments.encoding, arguments.mend, arguments.split, arguments.keep_err),
    )
    unlabelled = f", {report.unlabelled} of them without a label" if report.form[:7] != "TextSeg" else ""
    print(f"{report.out}: {report.written} of {report.total} images{unlabelled}")
    for part, count in report.parts.items() if len(report.parts) > 1 else ():
        print(f"  {part}: {count}")
    for reason, names in report.problems.items():
        print(f"left out, {reason}: {len(names)}")
        _some(names, len(names))
    for fault, count in report.faults.items():
        print(f"labels with {fault}: {count}" + (", mended" if report.mended else " (--mend mends them)"))
    if report.unlisted:
        print(f"pictures that the list does not name: {report.unlisted}")
    return 0


def _some(names: Sequence[str], count: int) -> None:
    for name in names[:_SHOWN]:
        print(f"  {name}")
    if count > _SHOWN:
        print(f"  and {count - _SHOWN} more")


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
        _print_json(asdict(report))
        return int(not report.sound)
    for name, reason in report.broken:
        print(f"{name}: {reason}")
    for fault, labels in report.labels.items():
        guess = f" (they look like {labels.guess})" if labels.guess else ""
        print(f"labels with the fault '{fault}'{guess}: {labels.count}")
        _some(labels.records, labels.count)
    if report.labels:
        print(f"to mend labels: rcmstr data convert {arguments.roots[0]} OUT --mend")
    faulty = "".join(f", {labels.count} labels: {fault}" for fault, labels in report.labels.items())
    print(f"{report.total} images, {len(report.broken)} broken{faulty}")
    for reason, count in Counter(reason for _, reason in report.broken).most_common(_SHOWN):
        print(f"  {count} x {reason}")
    return int(not report.sound)


def _print_json(content: object) -> None:
    """JSON of names that need not be UTF-8: their other bytes as `\\xff`."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    print(text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").replace("\\x", "\\\\x"))


def _overlap(arguments: Namespace) -> int:
    from rcmstr_fast.data.overlap import find_overlap
    from rcmstr_fast.data.source import open_sources

    again = Counter(arguments.roots)
    names = [f"{root} ({i})" if again[root] > 1 else root for i, root in enumerate(arguments.roots, 1)]
    sources = {name: open_sources([root]) for name, root in zip(names, arguments.roots)}
    report = find_overlap(sources, threads=arguments.threads)
    if arguments.json:
        _print_json(asdict(report))
        return int(bool(report.pairs or report.repeated))
    for pair in report.pairs:
        print(pair)
    for name, count in report.repeated.items():
        print(f"{count} pictures of {name} repeat another one there")
    print(f"{len(sources)} roots, {len(report.pairs)} pairs with pictures in common")
    return int(bool(report.pairs or report.repeated))


def _stats(arguments: Namespace) -> int:
    from rcmstr_fast.data.check import characters_of, set_stats, stats_table
    from rcmstr_fast.data.source import open_sources
    from rcmstr_fast.evaluation.protocols import get_protocol

    source = open_sources(arguments.roots)
    if arguments.characters:
        protocol = get_protocol(arguments.protocol)
        found = characters_of(source, lambda label: protocol.target(label)[0])
        if not found:
            raise ConfigError(
                f"roots must hold labels for a file of their characters, got {', '.join(arguments.roots)}"
            )
        try:
            Path(arguments.characters).write_bytes("".join(f"{c}\n" for c in found).encode("utf-8"))
        except OSError as error:
            raise ConfigError(f"characters must name a file that can be written: {error}") from error
    stats = [set_stats(found, arguments.charset, arguments.threads) for found in source.sets]
    if arguments.json:
        _print_json([asdict(one) for one in stats])
    else:
        print(stats_table(stats))
    return 0
