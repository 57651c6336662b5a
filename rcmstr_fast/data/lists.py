"""Lists of labels in the forms that text recognition projects use, told apart by their content."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.names import Names, folder_of
from rcmstr_fast.data.text import marked_encoding

_HEAD = 200
_FILE_COLUMNS = ("file_name", "filename", "file", "img_path", "image_path", "image", "img", "path")
_LABEL_COLUMNS = ("text", "words", "label", "transcription", "word")
_ICDAR = re.compile(r'\s*(?P<file>[^,]+?)\s*,\s*(?:"(?P<quoted>.*)"|(?P<plain>.*?))\s*')
_MJ = re.compile(r"(?P<file>\S*_(?P<label>[^_/\\]*)_(?P<number>\d+)\.\w+) (?P=number)")


@dataclass(frozen=True)
class Entry:
    """One line of a list.

    Attributes:
        where: `line 3`, for messages.
        file: as listed; None: the line is of another form.
        label: as listed; bytes that are not UTF-8 are surrogates. Of a line of another form, the line.
    """

    where: str
    file: str | None
    label: str


def _lines(text: str) -> Iterator[tuple[str, str]]:
    # Only line feeds end a line: labels may hold other separators.
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.removesuffix("\r"):
            yield f"line {number}", line


def _by_line(split: Callable[[str], Sequence[tuple[str, str]]]) -> Callable[[str], Iterator[Entry]]:
    """A parser from what makes (file, label) pairs of a line, none where it is of another form."""

    def parse(text: str) -> Iterator[Entry]:
        for where, line in _lines(text):
            pairs = split(line)
            yield from (Entry(where, file, label) for file, label in pairs)
            if not pairs:
                yield Entry(where, None, line)

    return parse


def _tsv(line: str) -> Sequence[tuple[str, str]]:
    file, tab, label = line.partition("\t")
    if not tab or not file:
        return ()
    if file.startswith("["):  # PaddleOCR: several pictures of one label
        try:
            return [(name, label) for name in json.loads(file) if isinstance(name, str)]
        except ValueError:
            pass
    return [(file, label)]


def _pairs(line: str) -> Sequence[tuple[str, str]]:
    file, mask, text = (*line.split("\t", 2), "", "")[:3]
    return [(file, text)] if file and mask.startswith(f"{MASKS}/") else ()


def _space(line: str) -> Sequence[tuple[str, str]]:
    file, space, label = line.partition(" ")
    return [(file, label)] if space and file else ()


def _icdar(line: str) -> Sequence[tuple[str, str]]:
    found = _ICDAR.fullmatch(line)
    if not found:
        return ()
    quoted = found["quoted"]
    return [(found["file"], found["plain"] if quoted is None else quoted.replace('\\"', '"'))]


def _mj(line: str) -> Sequence[tuple[str, str]]:
    found = _MJ.fullmatch(line)
    return [(found["file"], found["label"])] if found else ()


def _columns(names: Iterable[Any]) -> tuple[Any, Any] | None:
    """The keys of file and label among column names or keys."""
    known = {str(name).strip().lower(): name for name in names}
    file = next((known[name] for name in _FILE_COLUMNS if name in known), None)
    label = next((known[name] for name in _LABEL_COLUMNS if name in known), None)
    return None if file is None or label is None else (file, label)


def _csv(text: str) -> Iterator[Entry]:
    head = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=head.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        titles = next(rows, [])
        columns = _columns(titles)
        if columns is None:
            yield from (Entry(where, None, line) for where, line in _lines(text))
            return
        file, label = (titles.index(column) for column in columns)
        for row in rows:
            where = f"line {rows.line_num}"
            if len(row) == len(titles):
                yield Entry(where, row[file], row[label])
            elif row:
                yield Entry(where, None, delimiter.join(row))
    except csv.Error as error:
        yield Entry(f"line {rows.line_num}", None, str(error))


def _object(where: str, given: Any) -> Iterator[Entry]:
    """Of one JSON object: {file, label} by any of their names, or MMOCR's img_path with instances."""
    if isinstance(given, dict) and isinstance(given.get("instances"), list) and isinstance(given.get("img_path"), str):
        texts = [one.get("text") for one in given["instances"] if isinstance(one, dict)]
        if len(texts) == 1:
            yield Entry(where, given["img_path"], _label(texts[0]))
            return
    elif isinstance(given, dict) and (columns := _columns(given)) and isinstance(given[columns[0]], str):
        yield Entry(where, given[columns[0]], _label(given[columns[1]]))
        return
    yield Entry(where, None, json.dumps(given, ensure_ascii=False))


def _label(value: Any) -> str:
    return "" if value is None else str(value)


def _jsonl(text: str) -> Iterator[Entry]:
    for where, line in _lines(text):
        try:
            yield from _object(where, json.loads(line))
        except ValueError:
            yield Entry(where, None, line)


def _json(text: str) -> Iterator[Entry]:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        yield from (Entry(where, None, line) for where, line in _lines(text))
        return
    if isinstance(given, dict) and isinstance(given.get("data_list"), list):
        given = given["data_list"]
    if isinstance(given, dict) and all(isinstance(value, str) for value in given.values()):
        given = [{"file": file, "label": label} for file, label in given.items()]
    if not isinstance(given, list):
        yield Entry("line 1", None, text)
        return
    for number, one in enumerate(given, 1):
        yield from _object(f"entry {number}", one)


#: List of a folder of pictures with masks (picture, tab, mask, tab, text), and the folder of the masks.
PAIRS, MASKS = "pairs.tsv", "masks"
#: Format -> what it looks like, and the parser; in the order in which equally fitting ones are preferred.
FORMATS: dict[str, tuple[str, Callable[[str], Iterator[Entry]]]] = {
    "json": ("one JSON document (MMOCR, or file: label)", _json),
    "jsonl": ("a JSON object a line (MMOCR, Hugging Face metadata.jsonl)", _jsonl),
    "csv": ("a table with a header (EasyOCR labels.csv, Hugging Face metadata.csv)", _csv),
    "mj": ("lines 'file number', the label in the file name (MJSynth)", _by_line(_mj)),
    "pairs": ("lines 'picture TAB mask TAB text' of pictures with masks", _by_line(_pairs)),
    "tsv": ("lines 'file TAB label' (SynthTIGER, PaddleOCR)", _by_line(_tsv)),
    "icdar": ("lines 'file, \"label\"' (ICDAR)", _by_line(_icdar)),
    "space": ("lines 'file label' (MMOCR, RIMES)", _by_line(_space)),
}
#: Read alone where it is there.
OWN_LIST = "labels.tsv"
_SUFFIXES = (".tsv", ".txt", ".csv", ".json", ".jsonl")
_KNOWN = re.compile(r"(gt|labels?|rec_gt.*|metadata|.*_label)\.(txt|tsv|csv|json|jsonl)")


def decoded(data: bytes, encoding: str = "") -> str:
    """The text of a list; without an encoding UTF-8 or what a byte order mark says, other bytes as surrogates.

    Raises:
        ConfigError: the bytes are not of the encoding.
    """
    try:
        if marked := encoding or marked_encoding(data):
            return data.decode(marked).removeprefix("\ufeff")
    except (UnicodeDecodeError, LookupError) as error:
        raise ConfigError(f"expected text in the encoding {marked}: {error}") from error
    return data.decode("utf-8", "surrogateescape")


def recognise(text: str, names: Names, near: str = "") -> tuple[str, int]:
    """The format of a list, by how many of its first lines name files that are there.

    Args:
        text: of the list.
        names: the files.
        near: as in `Names.learn`.
    Returns:
        A name of `FORMATS`, and that number of lines.
    """
    head = "\n".join(islice((line for line in text.split("\n")), _HEAD))
    best: tuple[str, tuple[int, int, int]] = "tsv", (-1, 0, 0)
    for name, (_, parse) in FORMATS.items():
        if name == "json" and text.lstrip()[:1] not in ("[", "{"):
            continue
        entries = list(islice(parse(text if name == "json" else head), _HEAD))
        files = [entry.file for entry in entries if entry.file is not None]
        names.learn(files, near)
        found = sum(names.find(file) is not None for file in files)
        fit = found, found - len(entries), len(files)
        if fit > best[1]:
            best = name, fit
    return best[0], best[1][0]


def is_list(name: str, known: bool = False) -> bool:
    """Whether a file can be a list of labels, by its name alone; `known`: only if the name is a usual one."""
    last = name.rpartition("/")[2].lower()
    return not last.startswith(".") and bool(_KNOWN.fullmatch(last) if known else last.endswith(_SUFFIXES))


@dataclass
class Listing:
    """What the lists of a folder say.

    Attributes:
        labels: file -> label (see `Entry`), in their order; the first of several lines for a file counts.
        total: lines that are not empty.
        problems: reason -> the lines left out for it; `total` = labels + all of these.
        lists: name -> format, of the lists that were read.
        unread: lists that were not, because another one counts.
    """

    labels: dict[str, str] = field(default_factory=dict)
    total: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)
    lists: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def leave_out(self, reason: str, line: str) -> None:
        """Note a line that does not count."""
        self.problems.setdefault(reason, []).append(line)

    def add(self, name: str, text: str, form: str, names: Names) -> None:
        """Read one list."""
        self.lists[name] = form
        entries = list(FORMATS[form][1](text))
        self.total += len(entries)
        names.learn([entry.file for entry in entries if entry.file is not None], folder_of(name))
        for entry in entries:
            if entry.file is None:
                self.leave_out(f"not of the form {form}", f"{name}, {entry.where}: {entry.label[:60]!r}")
            elif (file := names.find(entry.file)) is None:
                self.leave_out("file missing", entry.file)
            elif file not in self.labels:
                self.labels[file] = entry.label
            else:
                other = "" if self.labels[file] == entry.label else " with another label"
                self.leave_out(f"listed twice{other}", f"{name}, {entry.where}: {entry.file}")

    def describe(self) -> str:
        """One line: what the lists were taken for, and what of them does not count."""
        taken = ", ".join(f"{name} taken for {form}: {FORMATS[form][0]}" for name, form in self.lists.items())
        left = "".join(f"; {len(lines)} lines {reason}, such as {lines[0]}" for reason, lines in self.problems.items())
        unread = f"; not read: {', '.join(self.unread)}" if self.unread else ""
        return f"{taken}; {len(self.labels)} of {self.total} lines count{left}{unread}"


def read_lists(
    names: Names,
    read: Callable[[str], bytes],
    *,
    order: str = "",
    chosen: Sequence[str] = (),
    encoding: str = "",
) -> Listing:
    """Find and read the lists of labels at the top of a folder.

    `labels.tsv` counts alone; otherwise every list whose lines name files that are there, all together.

    Args:
        names: all files, relative to the folder.
        read: name -> contents.
        order: the format, a name of `FORMATS`; empty: by content.
        chosen: the lists to read; empty: found as above.
        encoding: of the lists; empty: as in `decoded`.
    Returns:
        The labels; without lists an empty listing.
    Raises:
        ConfigError: a chosen list is missing, or a list is not of the encoding ordered.
    """
    there = sorted(name for name in names.names if "/" not in name and is_list(name))
    for name in chosen:
        if name not in names.names:
            raise ConfigError(f"expected a list of labels {name}, found {', '.join(there) or 'none'}")
    candidates = list(chosen) or ([OWN_LIST] if OWN_LIST in there else there)
    texts = {name: decoded(read(name), encoding) for name in candidates}
    forms = {name: recognise(text, names, folder_of(name)) for name, text in texts.items()}
    used = list(chosen) or [name for name in candidates if forms[name][1] > 0]
    used = used or [name for name in candidates if is_list(name, known=True)]
    listing = Listing(unread=[name for name in there if is_list(name, known=True) and name not in used])
    for name in used:
        listing.add(name, texts[name], order or forms[name][0], names)
    return listing
