"""Reading with a list of the words that can come: the nearest one by edit distance."""

from pathlib import Path
from typing import NamedTuple

from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from rcmstr_fast.config import ConfigError


class Match(NamedTuple):
    """A word of the list.

    Attributes:
        word: as it stands in the list.
        distance: insertions, deletions and substitutions from what was read.
    """

    word: str
    distance: int


class Lexicon:
    """The words that can come.

    Attributes:
        words: as in the file, each once.
    """

    def __init__(self, words: list[str], *, fold: bool) -> None:
        """Take the words; `fold` compares without case, for recognisers that write lower case only."""
        self.words = list(dict.fromkeys(words))
        self._fold = fold
        self._keys = [word.lower() for word in self.words] if fold else self.words
        self._places = {key: i for i, key in reversed(list(enumerate(self._keys)))}

    @classmethod
    def load(cls, path: str, *, fold: bool) -> "Lexicon":
        """A UTF-8 file with a word a line.

        Raises:
            ConfigError: no such file, not UTF-8, no word, or an empty line (its number is named).
        """
        try:
            lines = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except FileNotFoundError as error:
            raise ConfigError(f"lexicon must be a file with a word a line, got {path}, which does not exist") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"lexicon {path} must be UTF-8: {error}") from error
        if lines[-1] == "":  # the end of the last line
            lines.pop()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                raise ConfigError(f"lexicon {path} must have a word on every line, line {number} is empty")
        if not lines:
            raise ConfigError(f"lexicon {path} must have a word on every line, it is empty")
        return cls(lines, fold=fold)

    def nearest(self, text: str) -> Match:
        """The word with the least edit distance to `text`; the first of several."""
        key = text.lower() if self._fold else text
        if key in self._places:
            return Match(self.words[self._places[key]], 0)
        _, distance, place = process.extractOne(key, self._keys, scorer=Levenshtein.distance)
        return Match(self.words[place], int(distance))
