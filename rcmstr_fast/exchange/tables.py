"""What was read, as text, CSV, JSON lines or labels.tsv; written as it comes."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rcmstr_fast.config import ConfigError
from rcmstr_fast.exchange.lexicon import Match
from rcmstr_fast.exchange.reading import Reading

FORMATS = ("text", "csv", "jsonl", "labels")
_SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".tsv": "labels", ".txt": "text"}
_COLUMNS = ("file", "text", "confidence", "characters")
_LEXICON_COLUMNS = ("read", "distance")


def format_of(chosen: str, out: str) -> str:
    """The format of a file: as chosen, or for `auto` by its suffix (text without a file).

    Raises:
        ConfigError: an unknown suffix.
    """
    if chosen != "auto":
        return chosen
    suffix = Path(out).suffix.lower()
    if out and suffix not in _SUFFIXES:
        raise ConfigError(f"out must end in {', '.join(_SUFFIXES)}, or format must be given, got {out}")
    return _SUFFIXES.get(suffix, "text")


class Table:
    """Writes a reading a line.

    - text: file, text, confidence, with tabs between.
    - csv: RFC 4180 with a head; `characters` are the confidences of the text's characters, spaces between.
    - jsonl: an object a line.
    - labels: file, tab, text: the labels.tsv that `rcmstr data convert` takes.
    """

    def __init__(self, file: TextIO, kind: str, *, lexicon: bool) -> None:
        """Begin a table of one of `FORMATS`; `lexicon` adds what was read and its distance to the word."""
        self._file = file
        self._lexicon = lexicon
        self._write: Callable[[dict[str, Any]], None] = getattr(self, f"_{kind}")
        if kind == "csv":
            self._csv_writer = csv.writer(file, lineterminator="\n")
            self._csv_writer.writerow(_COLUMNS + (_LEXICON_COLUMNS if lexicon else ()))

    def add(self, name: str, reading: Reading, match: Match | None = None) -> str | None:
        """Write a line.

        Args:
            name: of the picture.
            reading: of it.
            match: its word of the lexicon, which then is the text.
        Returns:
            Why the line cannot be written in this format; None where it was.
        """
        row: dict[str, Any] = {
            "file": name,
            "text": match.word if match else reading.text,
            "confidence": round(reading.confidence, 6),
            "characters": [round(chance, 4) for chance in reading.characters],
        }
        if match:
            row |= {"read": reading.text, "distance": match.distance}
        if self._write in (self._text, self._labels) and any(c in f"{name}{row['text']}" for c in "\t\n\r"):
            return "a tab or line break in its name or text; csv and jsonl can hold it"
        self._write(row)
        return None

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._file.flush()

    def _text(self, row: dict[str, Any]) -> None:
        self._file.write(f"{row['file']}\t{row['text']}\t{row['confidence']:.4f}\n")

    def _labels(self, row: dict[str, Any]) -> None:
        self._file.write(f"{row['file']}\t{row['text']}\n")

    def _jsonl(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _csv(self, row: dict[str, Any]) -> None:
        chances = " ".join(f"{chance:.4f}" for chance in row["characters"])
        more = [row["read"], row["distance"]] if self._lexicon else []
        self._csv_writer.writerow([row["file"], row["text"], f"{row['confidence']:.6f}", chances, *more])
