"""Every number of every command, at its limits and beyond: one line that names it, or the command begins to work."""

import contextlib
import functools
import importlib
import io
import os
import shutil
import typing

import pytest
from safetensors.torch import load_file

from rcmstr_fast.cli import main as command_line
from rcmstr_fast.cli.arguments import Parser
from rcmstr_fast.methods import every_method, find
from tests.train.real import write_words

#: What no number may be, may be seldom, or is at its limit.
NUMBERS = ("nan", "inf", "-inf", "-1", "0", "1e30", "1" + 22 * "0")
LISTS = ("[]", "[1,1]", "[0,0]")
#: The words that each command needs, and what it calls when it has looked at its arguments and begins to work.
BEGINNINGS = {
    "pretrain": ((), "rcmstr_fast.train.loop.joined"),
    "tune": ((), "rcmstr_fast.train.distributed.joined"),
    "bench pipeline": (("--data.roots=words",), "rcmstr_fast.measure.pipeline.joined"),
    "bench step": ((), "rcmstr_fast.train.distributed.joined"),
    "bench methods": ((), "rcmstr_fast.cli.bench._checkout"),
    "bench ops": ((), "rcmstr_fast.cli.bench._checkout"),
    "probe": (("--encoder=random", "--train=words", "--test=words"), "rcmstr_fast.evaluation.running.joined"),
    "finetune": (("--encoder=random", "--train=words", "--test=words"), "rcmstr_fast.evaluation.running.joined"),
    "segment": (("--encoder=random", "--train=words", "--test=words"), "rcmstr_fast.evaluation.running.joined"),
    "embed": (("words", "--encoder=run", "--out=x.npz"), "rcmstr_fast.exchange.embed.embed"),
    "read": (("words", "--recogniser=run"), "rcmstr_fast.exchange.reading.Reader.load"),
    "import": (("file", "--from=dtrb", "--out=x"), "rcmstr_fast.exchange.importing.import_encoder"),
    "study": (("tiny_table1_cnn",), "rcmstr_fast.study.plan.read_study"),
    "plot tsne": (("words", "--recogniser=run"), "rcmstr_fast.plots.figures.tsne_figure"),
    "plot masks": (("words",), "rcmstr_fast.plots.figures.masks_figure"),
    "data synth": ((), "rcmstr_fast.data.synth.build.read_words"),
    "data check": (("words",), "rcmstr_fast.data.source.open_sources"),
    "data overlap": (("words",), "rcmstr_fast.data.source.open_sources"),
    "data stats": (("words",), "rcmstr_fast.data.source.open_sources"),
}
#: A run of one small step.
TINY = {
    "preset": "fast",
    "model.width": 0.125,
    "model.projector_hidden": 16,
    "model.feature_dim": 16,
    "data.workers": 1,
    "train.global_batch_size": 8,
    "train.steps": 1,
    "train.device": "cpu",
    "train.precision": "fp32",
    "train.trackers": [],
}
#: Commands with the fields of another one, which walks them in full.
SAME_FIELDS = ("tune", "bench pipeline", "bench step", "finetune")


class Begun(BaseException):
    """The command has accepted its arguments."""


made = command_line.parser_of


@functools.cache
def parser_of(name: str, method: str) -> Parser:
    return made(name, [f"--method.name={method}"] if method else [])


def parsers(name: str) -> dict[str, Parser]:
    """The command itself, or its sub-commands."""
    parser = parser_of(name, "")
    return {f"{name} {word}": below for word, below in parser.commands.items()} or {name: parser}


def numbers(parser: Parser) -> dict[str, bool]:
    """Options that take numbers, and whether they take lists of them."""
    found = {}
    for action in parser._actions:
        kinds = parts(getattr(action, "_typehint", None) or action.type)
        if action.option_strings and kinds & {int, float}:
            found[action.option_strings[0]] = list in kinds
    return found


def parts(kind) -> set:
    """A type and everything that it is made of."""
    origin = typing.get_origin(kind)
    inner = () if origin is typing.Literal else typing.get_args(kind)
    return {kind, origin}.union(*(parts(one) for one in inner))


def attempt(argv: list[str]) -> str:
    """`begun`, or the one line of a refusal, which leaves nothing behind."""
    before, told = sorted(os.listdir()), io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            status = command_line.main(argv)
    except Begun:
        for name in set(os.listdir()).difference(before):
            shutil.rmtree(name)  # what a grid of runs notes before its first run
        return "begun"
    assert sorted(os.listdir()) == before, argv
    lines = told.getvalue().splitlines()
    assert status == 2 and len(lines) == 1, (argv, status, lines)
    return lines[0]


def sweep(name: str, method: str = "", *, only: str = "--", skip: str = " ") -> list[tuple[str, str]]:
    """Walk the numbers of a command; (option, value) of all that it accepted."""
    chosen = dict(parsers(name.split()[0]))[name] if not method else parser_of(name, method)
    words, _ = BEGINNINGS[name]
    if method:
        encoder = next(spec.encoders for spec in every_method() if spec.name == method)[0]
        words = (*words, f"--method.name={method}", f"--model.encoder={encoder}")
    accepted = []
    assert attempt([*name.split(), *words]) == "begun"
    for option, is_list in numbers(chosen).items():
        if not option.startswith(only) or option.startswith(skip):
            continue
        values = ("nan",) if name in SAME_FIELDS else NUMBERS
        for value in (*values, *(LISTS if is_list else ())):
            given = f"[{value}]" if is_list and value[0] != "[" else value
            said = attempt([*name.split(), *words, f"{option}={given}"])
            if said == "begun":
                accepted.append((option, given))
            else:
                assert option.rsplit(".", 1)[-1].strip("-") in said.partition(": ")[2], (option, given, said)
    return accepted


@pytest.fixture
def beginning(monkeypatch, tmp_path):
    """Commands stop where they begin to work, and parsers are made once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        command_line,
        "parser_of",
        lambda name, argv: parser_of(name, next((x[14:] for x in argv if x.startswith("--method.name=")), "")),
    )

    def begin(*args, **kwargs):
        raise Begun

    for place in [*(place for _, place in BEGINNINGS.values()), "rcmstr_fast.evaluation.grid.joined"]:
        module, _, attribute = place.rpartition(".")
        try:
            holder = importlib.import_module(module)
        except ModuleNotFoundError:
            module, _, kind = module.rpartition(".")
            holder = getattr(importlib.import_module(module), kind)
        monkeypatch.setattr(holder, attribute, begin)


def test_every_command_with_numbers_is_walked():
    with_numbers = {x for name in command_line.available() for x, parser in parsers(name).items() if numbers(parser)}
    assert with_numbers == set(BEGINNINGS)


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_command(name, beginning):
    sweep(name)


@pytest.mark.parametrize("method", [spec.name for spec in every_method()])
def test_the_fields_of_a_method(method, beginning):
    sweep("pretrain", method, only="--method.")


@pytest.mark.parametrize("method", [spec.name for spec in every_method()][::4])
def test_numbers_at_their_limits_work(method, tmp_path):
    """A step in which every number of the method that may be 0 is 0."""
    parser, (encoder, *_) = parser_of("pretrain", method), find(method).encoders
    own = [option[2:] for option in numbers(parser) if option.startswith("--method.")]
    fields = TINY | {name: 0 for name in own if parser.ranges[name].low == 0}
    fields |= {"method.queue_size": 32} if "method.queue_size" in own else {}
    fields |= {"method.name": method, "model.encoder": encoder, "model.depth": 1, "train.tune": "off"}
    fields |= {"data.roots": f"[{write_words(tmp_path / 'words')}]", "run": tmp_path / "run"}
    assert command_line.main(["pretrain", *(f"--{name}={value}" for name, value in fields.items())]) == 0
    assert load_file(tmp_path / "run" / "encoder.safetensors")
