"""Folders and zip archives with a list of labels, to LMDB."""

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.progress import progress
from rcmstr_fast.data.staging import staged_folder

#: Lists of labels: ours, and SynthTIGER's; a line is FILE, TAB, LABEL.
LISTS = ("labels.tsv", "gt.txt")
_PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
#: Greatest size of a picture and of a list in bytes, uncompressed: a zip entry may claim anything.
MAX_IMAGE_BYTES, MAX_LIST_BYTES = 64 << 20, 2 << 30


@dataclass
class ConvertReport:
    """What became of the lines of a list.

    Attributes:
        out: the LMDB folder.
        written: records written.
        unlabelled: records of these without a label.
        problems: reason -> the lines or files left out for it.
        unlisted: pictures that no line names.
    """

    out: Path
    written: int = 0
    unlabelled: int = 0
    problems: dict[str, list[str]] = field(default_factory=dict)
    unlisted: int = 0

    def leave_out(self, reason: str, name: str) -> None:
        """Note a line or file that is not converted."""
        self.problems.setdefault(reason, []).append(name)


@dataclass
class _Input:
    """Files by name relative to the list of labels, as in it; `read` raises OSError or ValueError."""

    lines: str
    names: set[str]
    read: Callable[[str], bytes]


def _folder_input(folder: Path) -> _Input:
    root = folder.resolve()

    def read(name: str) -> bytes:
        path = root / name
        if not path.resolve().is_relative_to(root):
            raise ValueError("leads outside the folder")
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise ValueError(f"larger than {MAX_IMAGE_BYTES} bytes")
        return path.read_bytes()

    lists = [name for name in LISTS if (root / name).is_file()]
    if len(lists) != 1:
        raise ConfigError(f"convert: expected one of {' or '.join(LISTS)} in {folder}, found {lists or 'neither'}")
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return _Input(_text((root / lists[0]).read_bytes(), lists[0]), names, read)


def _zip_input(archive: zipfile.ZipFile) -> _Input:
    """Entries are only read by name into memory, never unpacked, so that their paths can do no harm."""
    entries = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    lists = [name for name in entries if PurePosixPath(name).name in LISTS]
    depth = min((name.count("/") for name in lists), default=0)
    lists = [name for name in lists if name.count("/") == depth]
    if len(lists) != 1:
        raise ConfigError(
            f"convert: expected one of {' or '.join(LISTS)} in {archive.filename}, found {lists or 'neither'}"
        )
    base = lists[0].rpartition("/")[0]
    prefix = f"{base}/" if base else ""

    def contents(name: str, limit: int) -> bytes:
        with archive.open(entries[name]) as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ValueError(f"larger than {limit} bytes")
        return data

    def read(name: str) -> bytes:
        try:
            return contents(prefix + name, MAX_IMAGE_BYTES)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise ValueError(f"damaged or encrypted: {error}") from error
        except Exception as error:  # zlib, lzma and bz2 have exceptions of their own
            raise ValueError(str(error)) from error

    names = {name.removeprefix(prefix) for name in entries if name.startswith(prefix)}
    try:
        return _Input(_text(contents(lists[0], MAX_LIST_BYTES), lists[0]), names, read)
    except ConfigError:
        raise
    except Exception as error:  # as in read
        raise ConfigError(f"convert: {lists[0]} in {archive.filename} cannot be read: {error}") from error


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"convert: expected UTF-8 in {name}: {error}") from error


def _records(given: _Input, report: ConvertReport) -> Iterator[tuple[bytes, str | None]]:
    seen: set[str] = set()
    # Only line feeds end a line: labels may hold other separators.
    for number, line in enumerate(given.lines.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line:
            continue
        listed, tab, label = line.partition("\t")
        if not tab or not listed:
            report.leave_out("no 'file TAB label'", f"line {number}: {line[:60]!r}")
            continue
        name = listed.replace("\\", "/").removeprefix("./")
        if name not in given.names and f"images/{name}" in given.names:
            name = f"images/{name}"
        if name in seen:
            report.leave_out("listed twice", f"line {number}: {listed}")
            continue
        if name not in given.names:
            report.leave_out("file missing", listed)
            continue
        seen.add(name)
        try:
            data = given.read(name)
            if not data:
                raise ValueError("zero bytes")
        except (OSError, ValueError) as error:
            report.leave_out("file unreadable", f"{listed}: {error}")
            continue
        report.written += 1
        report.unlabelled += not label
        yield data, label or None
    pictures = {name for name in given.names if PurePosixPath(name).suffix.lower() in _PICTURES}
    report.unlisted = len(pictures - seen)


def convert(source: str | Path, out: str | Path) -> ConvertReport:
    """Pack labelled pictures into an LMDB of the usual scene-text layout.

    Args:
        source: folder or .zip with `labels.tsv` or SynthTIGER's `gt.txt` (a line: file, tab, label; UTF-8, a byte
            order mark and CR LF do no harm) and the files named there, relative to the list or to `images/`
            beside it. An empty label means unlabelled; of lines for the same file the first counts.
        out: LMDB folder to make.
    Returns:
        What was written and what was left out, by reason and name.
    Raises:
        ConfigError: no such input, no list of labels, nothing to convert, or `out` exists.
    """
    source, report = Path(source), ConvertReport(Path(out))
    if source.is_dir():
        return _convert(_folder_input(source), report, str(source))
    if not source.is_file():
        raise ConfigError(f"convert: expected a folder or a .zip file, got {source}, which does not exist")
    try:
        with zipfile.ZipFile(source) as archive:
            return _convert(_zip_input(archive), report, str(source))
    except zipfile.BadZipFile as error:
        raise ConfigError(f"convert: expected a folder or a .zip file, got {source}: {error}") from error


def _convert(given: _Input, report: ConvertReport, source: str) -> ConvertReport:
    lines = given.lines.count("\n") + 1
    with staged_folder(report.out) as folder:
        write_lmdb(folder, progress(_records(given, report), lines, "converting", "images"))
        if not report.written:
            reasons = ", ".join(f"{len(names)} {reason}" for reason, names in report.problems.items())
            raise ConfigError(f"convert: nothing to convert in {source} ({reasons or 'the list is empty'})")
    return report
