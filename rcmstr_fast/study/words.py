"""Rendered words for studies and the demo: training and held-out sets that have no text in common."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.synth import Effects, SynthConfig, render_lmdb
from rcmstr_fast.data.synth.words import read_words

#: Few and mild effects: what a small decoder learns in minutes.
_OFF = "colour curve outline shadow shading texture clutter fade motion spacing"
_ON = {"rotation": 0.1, "perspective": 0.1, "lighting": 0.1, "blur": 0.1, "low_resolution": 0.1, "noise": 0.2}
MILD: dict[str, Any] = dict.fromkeys(_OFF.split(), 0.0) | _ON | {"stretch": 0.2}

_FIELDS = ("count", "seed", "texts", "longest", "shortest", "held_out", "mild", "mixed", "families", "num_words")


def is_held_out(text: str) -> bool:
    """Whether a text belongs to the tenth of all texts that is never trained on."""
    return hashlib.sha256(text.encode()).digest()[0] < 26


def vocabulary(texts: str, shortest: int, longest: int, num_words: int) -> list[str]:
    """Texts to render.

    Args:
        texts: numbers (every number with these counts of digits) or words (frequent English words).
        shortest: fewest characters.
        longest: most characters.
        num_words: frequent words to choose from.
    """
    if texts == "numbers":
        return [f"{number:0{n}}" for n in range(shortest, longest + 1) for number in range(10**n)]
    words = [word.lower() for word in read_words(SynthConfig(num_words=num_words))]
    return list(dict.fromkeys(w for w in words if shortest <= len(w) <= longest and w.isascii() and w.isalnum()))


def render_set(fields: dict[str, Any], out: Path) -> None:
    """Render a set of words into an LMDB.

    Args:
        fields: `count` pictures, `seed`, `texts` (numbers, words), `shortest` and `longest` counts of characters,
            `held_out` (its texts are in no set without it), `mild` (few effects), `mixed` (capitals, and in sets that
            are not held out numbers, punctuation and random characters, as `rcmstr data synth` has them), `families`
            of fonts, `num_words` to choose from.
        out: folder of the LMDB.
    Raises:
        ConfigError: an unknown field, or no text that fits.
    """
    unknown = next((name for name in fields if name not in _FIELDS), None)
    if unknown is not None:
        raise ConfigError(f"data to render has the fields {', '.join(_FIELDS)}, got {unknown}")
    chosen = vocabulary(
        fields.get("texts", "words"),
        fields.get("shortest", 1),
        fields.get("longest", 25),
        fields.get("num_words", 30_000),
    )
    chosen = [text for text in chosen if is_held_out(text) == bool(fields.get("held_out", False))]
    if not chosen:
        raise ConfigError(f"data to render: no text fits {fields}")
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch) / "texts.txt"
        listed.write_text("\n".join(chosen), encoding="utf-8")
        config = SynthConfig(
            out=str(out), count=fields.get("count", 1000), seed=fields.get("seed", 0), words=str(listed)
        )
        if not fields.get("mixed", False):
            config.upper = config.capitalised = 0.0
        if not fields.get("mixed", False) or fields.get("held_out", False):
            config.numbers = config.random_text = config.punctuation = 0.0
        if fields.get("mild", False):
            config.effects = Effects(**MILD)
        if fields.get("families"):
            config.families = list(fields["families"])
        render_lmdb(config)
