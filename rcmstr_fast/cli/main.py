"""The command `rcmstr`: finds the command's module, parses, runs, and turns known errors into one line."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from signal import SIGPIPE
from typing import TYPE_CHECKING

import rcmstr_fast
from rcmstr_fast import console
from rcmstr_fast.config import ConfigError, RunError

if TYPE_CHECKING:  # both are slow to import
    from jsonargparse import Namespace

    from rcmstr_fast.cli.arguments import Parser

#: Commands in the order of the help page; each is a module of this package with
#: NAME, HELP, add_arguments(parser) and run(arguments) -> exit status, imported when it is used.
COMMANDS = (
    "demo",
    "doctor",
    "tune",
    "data",
    "pretrain",
    "methods",
    "probe",
    "finetune",
    "segment",
    "read",
    "embed",
    "export",
    "import",
    "study",
    "report",
    "plot",
    "recipes",
    "bench",
)

#: Commands whose output is all that they are for: they end quietly where its reader has gone (`| head`), as others do not.
_SHOWING = {"doctor", "read", "report"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a console that goes away does not end it.

    Args:
        argv: arguments after `rcmstr`; None: those of the process.
    Returns:
        0; 2 after an error of the user's; 130 after Ctrl-C; 128 + n where signal n ended a run in good order.
    """
    # Waiting OpenMP threads sleep instead of spinning: on a machine that does anything else at the same time
    # (our own loader, for one) spinning makes a step several times slower. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else "--help"
    with console.kept(strict_output=name in _SHOWING):
        return _guarded(name, argv)


def _guarded(name: str, argv: list[str]) -> int:
    """The command, its known errors as one line."""
    if name in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if name == "--version":
        print(f"rcmstr_fast {rcmstr_fast.__version__}")
        return 0
    if name not in available():
        return _fail("rcmstr", f"unknown command {name}{_nearest(name)}")
    try:
        return _run(name, argv[1:])
    except KeyboardInterrupt:
        return 130
    except (ConfigError, RunError, OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and name in _SHOWING:
            return 128 + SIGPIPE
        return _fail(f"rcmstr {name}", _text(error), getattr(error, "status", 2))
    except RuntimeError as error:
        # By name and words: the modules of these errors import torch, which has no class of its own for host memory.
        if type(error).__name__ not in ("BackendError", "OutOfMemoryError") and "allocate memory" not in str(error):
            raise
        return _fail(f"rcmstr {name}", _text(error))


def available() -> list[str]:
    """The commands of this installation."""
    return [name for name in COMMANDS if importlib.util.find_spec(f"rcmstr_fast.cli.{name}")]


def _run(name: str, argv: list[str]) -> int:
    return importlib.import_module(f"rcmstr_fast.cli.{name}").run(_parsed(parser_of(name, argv), argv))


def parser_of(name: str, argv: list[str]) -> "Parser":
    """The parser of a command, with the fields that these arguments let it have."""
    from rcmstr_fast.cli.arguments import Parser

    command = importlib.import_module(f"rcmstr_fast.cli.{name}")
    parser = Parser(prog=f"rcmstr {name}", description=command.HELP)
    parser.given = argv
    command.add_arguments(parser)
    return parser


def _parsed(parser: "Parser", argv: list[str]) -> "Namespace":
    """The arguments with their dataclasses made."""
    try:
        return parser.instantiate(parser.parse_args(argv))
    except (ConfigError, OSError):
        raise
    except Exception as error:  # jsonargparse over a YAML file of arbitrary bytes and types fails in any way
        raise ConfigError(f"the arguments cannot be understood: {_text(error)[:300]}") from error


def _help() -> str:
    lines = ["usage: rcmstr COMMAND [--config FILE.yaml] [--field value ...]", "", "commands:"]
    for name in available():
        lines.append(f"  {name:<10}{importlib.import_module(f'rcmstr_fast.cli.{name}').HELP}")
    return "\n".join([*lines, "", "rcmstr COMMAND --help shows its fields; rcmstr --version the version"])


def _nearest(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, available(), 1)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(available())}"


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory"
    return " ".join(str(error).split())


def _fail(prefix: str, text: str, status: int = 2) -> int:
    rank = os.environ.get("RANK")
    print(f"{prefix}{f' (rank {rank})' if rank else ''}: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
