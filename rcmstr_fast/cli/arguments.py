"""What the commands share: a parser whose errors are one line, and dataclasses as arguments."""

import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar, cast

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from rcmstr_fast import recipe_files
from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.fields import Bounds, check_value

T = TypeVar("T")

_UNKNOWN = (
    r"unrecognized arguments: --(?P<name>[^\s=]+)",
    r"Group '(?P<group>[^']*)' does not accept option '(?P<name>[^']*)'",
    r"Option '(?P<name>[^']*)' is not accepted",
)


#: The method where neither an argument nor a file names one.
DEFAULT_METHOD = "rcmstr"


class Parser(ArgumentParser):
    """jsonargparse's parser; a wrong argument is a ConfigError of one line that names the nearest field.

    Attributes:
        given: the arguments that will be parsed; which method they name decides on the fields that there are.
        method: that method, once its fields are there.
        ranges: of the numbers, by dotted name; a number without one must be finite and fit 64 bits.
        commands: parsers of the sub-commands.
    """

    given: Sequence[str] = ()
    method: str = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        self.ranges: dict[str, Bounds] = {}
        self.commands: dict[str, Parser] = {}
        super().__init__(*args, allow_abbrev=False, **kwargs)

    #: Options that take several values, `--name 1 2 3`, beside the list in one, `--name [1,2,3]`; one value stays one.
    spread: tuple[str, ...] = ()
    #: Options for lists of words: `--name a`, `--name a b c` or `--name [a,b,c]`.
    words: tuple[str, ...] = ()

    def add_argument(self, *args: Any, bounds: Bounds | None = None, **kwargs: Any) -> Any:
        """Add an argument; `bounds` is the range of its numbers."""
        action = super().add_argument(*args, **kwargs)
        if bounds is not None:
            self.bind(action, bounds)
        return action

    def bind(self, action: Any, bounds: Bounds) -> None:
        """Give the numbers of an argument a range, which the help page shows."""
        self.ranges[action.dest] = bounds
        action.help = f"{(action.help or '').rstrip('.')}; {bounds}."

    def add_subcommands(self, *args: Any, **kwargs: Any) -> Any:
        """Add sub-commands."""
        action = super().add_subcommands(*args, **kwargs)
        self.commands = action.choices
        return action

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Parse (see `spread` and `words`), and check every number against its range."""
        given = list(sys.argv[1:] if args is None else args)
        found = super().parse_args(_joined(with_files(given), self.spread, self.words), namespace, **kwargs)
        self.check(found)
        return found

    def check(self, namespace: Namespace) -> None:
        """Raise ConfigError where a number is out of its range."""
        chosen = namespace.get("subcommand")
        if chosen in self.commands:
            self.commands[chosen].check(namespace[chosen])
            return
        for name, value in namespace.items():
            check_value(name, value, self.ranges.get(name))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message as a ConfigError."""
        raise ConfigError(self._one_line(message)) from ex

    def _one_line(self, message: str) -> str:
        for pattern in _UNKNOWN:
            found = re.search(pattern, message)
            if found:
                name = ".".join(part for part in (found.groupdict().get("group"), found["name"]) if part)
                return self._foreign(name) or f"unknown field {name}{self._nearest(name)}"
        return _wrong_value(message) or " ".join(message.split())

    def _foreign(self, name: str) -> str | None:
        """A field that only other methods have, or None."""
        from rcmstr_fast.methods import every_method

        field = name.rsplit(".", 1)[-1]
        specs = every_method() if self.method and name == f"method.{field}" else []
        owners = [spec.name for spec in specs if field in {f.name for f in dataclasses.fields(spec.config)}]
        if not owners:
            return None
        known = [f.name for spec in specs if spec.name == self.method for f in dataclasses.fields(spec.config)]
        return (
            f"method {self.method} has no field {field} (method {', '.join(owners)} has); "
            f"expected one of {', '.join(known)}{self._nearest(name)}"
        )

    def _nearest(self, name: str) -> str:
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        known = [option for option in known if not option.endswith("+")]
        last = {option.rsplit(".", 1)[-1]: option for option in known}
        near = difflib.get_close_matches(name, known, 1) or [
            last[x] for x in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, 1)
        ]
        return f"; did you mean {near[0]}?" if near else "; --help lists the fields"


def with_files(words: Sequence[str]) -> list[str]:
    """The arguments, with the names of recipes after `--config` replaced by their files.

    Raises:
        ConfigError: neither a file nor a recipe.
    """
    found = list(words)
    for place, word in enumerate(found):
        if word.startswith("--config="):
            found[place] = f"--config={recipe_files.find(word.partition('=')[2])}"
        elif word == "--config" and place + 1 < len(found):
            found[place + 1] = str(recipe_files.find(found[place + 1]))
    return found


def _joined(words: list[str], options: tuple[str, ...], of_words: tuple[str, ...]) -> list[str]:
    """Words after one of the options, up to the next option, as one list; one value stays one unless it is a word."""
    found: list[str] = []
    at = 0
    while at < len(words):
        end = at + 1
        if words[at] in options or words[at] in of_words:
            while end < len(words) and not words[end].startswith("--"):
                end += 1
                if words[end - 1].startswith("["):
                    break
        values = words[at + 1 : end]
        if words[at] in of_words and values and not values[0].startswith("["):
            values = [json.dumps(values, ensure_ascii=False)]
        found += [words[at], f"[{','.join(values)}]"] if len(values) > 1 else [words[at], *values]
        at = end
    return found


def _wrong_value(message: str) -> str | None:
    """jsonargparse's several lines about a value of the wrong type, in one."""
    field = re.search(r'Parser key "(.+?)":', message)
    expected = re.findall(r"Expected an? (.+?)(?=\. Got value: |\n|$)", message)
    got = re.search(r"Given value: (.*)", message) or re.search(r"Got value: (.*)", message)
    if not (field and expected and got):
        return None
    kinds = [re.sub(r"<class '(\w+)'>", r"\1", kind).replace("NoneType", "null") for kind in dict.fromkeys(expected)]
    kinds = [re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind) for kind in kinds]
    hint = f"; write [{got[1].strip()}]" if kinds[0] == "list" else ""
    return f"{field[1]}: expected {' or '.join(kinds)}, got {got[1].strip()}{hint}"


def add_dataclass(parser: Parser, cls: type, skip: set[str] | None = None) -> None:
    """Add `--config FILE.yaml` and one dotted argument for each field of a configuration dataclass but `skip`."""
    what = "YAML file with any of the fields below, or the name of a recipe; flags win over it"
    parser.add_argument("--config", action="config", help=what)
    parser.add_class_arguments(cls, skip=set(skip or ()))
    ranges = dict(_ranges(cls))
    for action in parser._actions:
        if action.dest in ranges:
            parser.bind(action, ranges[action.dest])


def _ranges(cls: Any, prefix: str = "") -> Iterator[tuple[str, Bounds]]:
    """(dotted name, range) of every field that declares one, nested ones included."""
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.default_factory):
            yield from _ranges(field.default_factory, f"{prefix}{field.name}.")
        elif "bounds" in field.metadata:
            yield prefix + field.name, field.metadata["bounds"]


def to_dataclass(cls: type[T], arguments: Namespace) -> T:
    """The configuration that parsed (and instantiated) arguments describe."""
    fields = dataclasses.fields(cast(Any, cls))
    return cls(**{field.name: arguments[field.name] for field in fields})


def add_pretraining(parser: Parser, given: Sequence[str] | None = None) -> None:
    """Add the fields of PretrainConfig, with those of the method that the arguments or their files name.

    Args:
        parser: takes them.
        given: the arguments; None: `parser.given`.
    Raises:
        ConfigError: there is no such method.
    """
    from rcmstr_fast.methods import find

    spec = find(named_method(parser.given if given is None else given) or DEFAULT_METHOD)
    parser.method = spec.name
    own = [("method", spec.config, dataclasses.field(default_factory=spec.config))]
    config = dataclasses.make_dataclass("PretrainConfig", own, bases=(PretrainConfig,))
    config.__doc__ = PretrainConfig.__doc__
    add_dataclass(parser, config)


def to_pretraining(arguments: Namespace) -> PretrainConfig:
    """The PretrainConfig that the arguments of `add_pretraining` describe."""
    return to_dataclass(PretrainConfig, arguments)


def named_method(given: Sequence[str]) -> str | None:
    """`method.name` of the arguments: of the flag, else of the last file of `--config`."""
    flags: dict[str, list[str]] = {"--method.name": [], "--config": []}
    for place, word in enumerate(given := with_files(list(given))):
        name, equals, value = word.partition("=")
        if name in flags and (equals or place + 1 < len(given)):
            flags[name].append(value if equals else given[place + 1])
    names = flags["--method.name"] or [name for name in map(_method_of_file, flags["--config"]) if name]
    return names[-1] if names else None


def _method_of_file(path: str) -> str | None:
    """`method.name` of a YAML file; None where it has none or cannot be read, which parsing it will say."""
    try:
        held = yaml.safe_load(recipe_files.find(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # a ConfigError is a ValueError
        return None
    method = held.get("method") if isinstance(held, dict) else None
    name = method.get("name") if isinstance(method, dict) else None
    return name if isinstance(name, str) else None
