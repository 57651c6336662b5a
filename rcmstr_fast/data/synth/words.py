"""What the crops say: words in lower case, capitals and between, numbers, random characters."""

import string
from pathlib import Path
from random import Random

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.synth.config import SynthConfig
from rcmstr_fast.data.synth.fonts import FontSet

#: Forms of numbers; each # becomes a digit.
_NUMBERS = ("#", "##", "###", "####", "#####", "##.##", "#.#", "#,###", "$##", "$#.##", "##%", "##:##", "#-#", "##/##",
            "###-####", "+##", "#th", "No.#", "A##", "#x#", "(##)", "20##", "19##")  # fmt: skip
_SUFFIXES = (".", ",", "!", "?", ":", ";", "'s", "...", "&", "*", "-")
_FRAMES = (("(", ")"), ('"', '"'), ("'", "'"), ("[", "]"), ("#", ""), ("@", ""), ("-", "-"))


def read_words(config: SynthConfig) -> list[str]:
    """The words of the file and of the built-in list, each once, in order; not yet filtered.

    Raises:
        ConfigError: the file or the list is missing, or the language is unknown.
    """
    words: list[str] = []
    if config.words:
        path = Path(config.words)
        if not path.is_file():
            raise ConfigError(f"data synth: words must be a text file, got {config.words!r}")
        try:
            words = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
        except UnicodeDecodeError as error:
            raise ConfigError(f"data synth: {path} must be UTF-8: {error}") from error
    language = config.language if config.language is not None else ("" if config.words else "en")
    if language:
        words += _built_in(language, config.num_words)
    return list(dict.fromkeys(word for word in words if word))


def _built_in(language: str, count: int) -> list[str]:
    try:
        from wordfreq import available_languages, top_n_list
    except ImportError as error:
        raise ConfigError(
            "data synth: the built-in word lists are missing, install them with: pip install 'rcmstr-fast[synth]', "
            "or give a file with words"
        ) from error
    known = sorted(available_languages())
    if language not in known:
        raise ConfigError(f"data synth: language must be one of {' '.join(known)}, got {language!r}")
    return top_n_list(language, count)


class WordSource:
    """Draws the text of a crop.

    Every text is at most `max_length` long, inside the charset, and drawable by one font.

    Args:
        words: candidates, as from `read_words`.
        config: lengths, charset, shares.
        fonts: words that no single font can draw are left out.
    Raises:
        ConfigError: no word is left; the text says why.
    """

    def __init__(self, words: list[str], config: SynthConfig, fonts: FontSet) -> None:
        charset = None if config.charset == "any" else set(Charset.load(config.charset).characters)
        self._config, self._fonts, self._charset = config, fonts, charset
        self.left_out = {"longer than max_length": 0, "outside the charset": 0, "no font has its characters": 0}
        self.words = []
        for word in words:
            reason = self._reason_against(word)
            if reason:
                self.left_out[reason] += 1
            else:
                self.words.append(word)
        if not self.words:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            raise ConfigError(
                f"data synth: none of the {len(words)} words can be rendered ({counts}); "
                "see --charset (any takes every character) and --fonts"
            )
        letters = charset if charset is not None else set("".join(self.words))
        self.alphabet = sorted(letter for letter in letters if not letter.isspace() and fonts.can_draw(letter))

    def _reason_against(self, text: str) -> str | None:
        if len(text) > self._config.max_length:
            return "longer than max_length"
        if self._charset is not None and not self._charset.issuperset(text):
            return "outside the charset"
        return None if self._fonts.can_draw(text) else "no font has its characters"

    def draw(self, rng: Random) -> str:
        """One text; a variation that the charset, the length or the fonts forbid becomes the plain word."""
        kind = rng.random()
        word = self.words[int(rng.random() * len(self.words))]
        if kind < self._config.numbers:
            text = self._number(rng)
        elif kind < self._config.numbers + self._config.random_text:
            length = 1 + int(rng.random() * min(8, self._config.max_length))
            text = "".join(self.alphabet[int(rng.random() * len(self.alphabet))] for _ in range(length))
        else:
            text = self._vary(word, rng)
        return text if text and self._reason_against(text) is None else word

    def _number(self, rng: Random) -> str:
        form = _NUMBERS[int(rng.random() * len(_NUMBERS))]
        return "".join(string.digits[int(rng.random() * 10)] if c == "#" else c for c in form)

    def _vary(self, word: str, rng: Random) -> str:
        config, case, mark = self._config, rng.random(), rng.random()
        text = word
        if case < config.upper:
            text = word.upper()
        elif case < config.upper + config.capitalised:
            text = word[:1].upper() + word[1:]
        if self._reason_against(text) is not None:
            text = word
        if mark < config.punctuation * 0.6:
            return text + _SUFFIXES[int(rng.random() * len(_SUFFIXES))]
        if mark < config.punctuation:
            before, after = _FRAMES[int(rng.random() * len(_FRAMES))]
            return before + text + after
        return text
