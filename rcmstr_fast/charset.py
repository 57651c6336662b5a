"""The characters a decoder knows, in the order of their ids."""

import string
from collections.abc import Iterable, Sequence
from pathlib import Path

from rcmstr_fast.config import ConfigError

#: Longest label that decoders are trained on, in characters.
MAX_LENGTH = 25

_NAMED = {
    "36": string.digits + string.ascii_lowercase,
    "62": string.digits + string.ascii_letters,
    "94": string.digits + string.ascii_letters + string.punctuation,
}


class Charset:
    """An ordered set of characters; nothing is folded or normalised.

    Args:
        characters: single characters, each once; their order is the order of ids.
    Raises:
        ValueError: an entry is not one character, or comes twice.
    """

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters: tuple[str, ...] = tuple(characters)
        if not self.characters:
            raise ValueError("Charset: expected at least one character, got none")
        self._ids: dict[str, int] = {}
        for i, character in enumerate(self.characters):
            if not isinstance(character, str) or len(character) != 1:
                raise ValueError(f"Charset: expected single characters, got {character!r} at place {i}")
            if character in self._ids:
                raise ValueError(f"Charset: {character!r} comes twice, at places {self._ids[character]} and {i}")
            self._ids[character] = i

    @classmethod
    def load(cls, name: str) -> "Charset":
        """A charset by name or from a file.

        Args:
            name: 36, 62, 94 (digits, lower case, upper case, punctuation, in this order), or the path of a UTF-8
                file with one character a line or all in one line. A space is a character like any other.
        Raises:
            ConfigError: no such name or file, or the file is not of this form.
        """
        if name in _NAMED:
            return cls(_NAMED[name])
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"charset must be 36, 62, 94 or a file, got {name!r}")
        try:
            # Only line feeds end a line: other separators (U+2028, U+0085) may be characters of the set.
            lines = path.read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"charset file {path} must be UTF-8: {error}") from error
        lines = [line.removesuffix("\r") for line in lines]
        filled = [(number, line) for number, line in enumerate(lines, 1) if line]
        if len(filled) > 1:
            for number, line in filled:
                if len(line) != 1:
                    raise ConfigError(
                        f"charset file {path}, line {number}: expected one character a line "
                        f"(or all characters in one line), got {line!r}"
                    )
        try:
            return cls("".join(line for _, line in filled))
        except ValueError as error:
            raise ConfigError(f"charset file {path}: {error}") from error

    def __len__(self) -> int:
        return len(self.characters)

    def __contains__(self, character: object) -> bool:
        return character in self._ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Charset) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def __repr__(self) -> str:
        shown = "".join(self.characters[:12])
        return f"Charset({len(self)} characters: {shown!r}{'...' if len(self) > 12 else ''})"

    def missing(self, text: str) -> str:
        """The characters of the text that are outside the charset, each once, in order; empty if none."""
        return "".join(dict.fromkeys(character for character in text if character not in self._ids))

    def encode(self, text: str, first: int = 0) -> list[int]:
        """Ids of the characters of a text.

        Args:
            text: only characters of the charset.
            first: id of the first character of the charset (CTC 1, attention and transformer 3).
        Raises:
            ValueError: naming the characters outside the charset.
        """
        try:
            return [self._ids[character] + first for character in text]
        except KeyError:
            raise ValueError(
                f"Charset.encode: expected characters of the {len(self)}-character set, "
                f"got {self.missing(text)!r} in {text!r}"
            ) from None

    def decode(self, ids: Sequence[int], first: int = 0) -> str:
        """The text of ids; the inverse of `encode`.

        Raises:
            ValueError: an id belongs to no character.
        """
        for i in ids:
            if not first <= i < first + len(self):
                raise ValueError(f"Charset.decode: expected ids in {first}..{first + len(self) - 1}, got {i}")
        return "".join(self.characters[i - first] for i in ids)

    def to_list(self) -> list[str]:
        """The characters as a plain list of strings, for checkpoints; `Charset(list)` is the way back."""
        return list(self.characters)
