"""Folders and zip archives as files by relative name; archives are never unpacked to disk."""

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.lists import is_list
from rcmstr_fast.data.names import Names, folder_of

#: Greatest size of a picture and of a list in bytes, uncompressed: a zip entry may claim anything.
MAX_IMAGE_BYTES, MAX_LIST_BYTES = 64 << 20, 2 << 30


@dataclass
class Files:
    """The files of a set.

    Attributes:
        title: the folder or archive, for messages.
        names: of all files but hidden ones, relative to the folder of the list of labels.
        read: (name, most bytes) -> contents; raises OSError or ValueError.
    """

    title: str
    names: Names
    read: Callable[[str, int], bytes]

    def picture(self, name: str) -> bytes:
        """Contents of a picture.

        Raises:
            OSError, ValueError: it cannot be read, is empty, or larger than `MAX_IMAGE_BYTES`.
        """
        data = self.read(name, MAX_IMAGE_BYTES)
        if not data:
            raise ValueError("zero bytes")
        return data

    def text(self, name: str) -> bytes:
        """Contents of a list or another description.

        Raises:
            ConfigError: it cannot be read, or is larger than `MAX_LIST_BYTES`.
        """
        try:
            return self.read(name, MAX_LIST_BYTES)
        except (OSError, ValueError) as error:
            raise ConfigError(f"convert: {name} in {self.title} cannot be read: {error}") from error


def _base(names: Iterable[str]) -> str:
    """The folder that a set begins with: that of its only list nearest the top, with a `/` at its end."""
    lists = [name for name in names if is_list(name, known=True)]
    depth = min((name.count("/") for name in lists), default=0)
    folders = {folder_of(name) for name in lists if name.count("/") == depth}
    return folders.pop() if len(folders) == 1 else ""


def _hidden(name: str) -> bool:
    return any((part.startswith(".") and part not in ("..", ".")) or part == "__MACOSX" for part in name.split("/"))


@contextmanager
def open_files(source: str | Path) -> Iterator[Files]:
    """The files of a folder or a .zip; entries of an archive are read by name into memory, so that no path does harm.

    Raises:
        ConfigError: it is neither.
    """
    source = Path(source)
    if source.is_dir():
        yield _folder(source)
        return
    if not source.is_file():
        raise ConfigError(f"convert: expected a folder or a .zip file, got {source}, which does not exist")
    try:
        with zipfile.ZipFile(source) as archive:
            yield _archive(archive, str(source))
    except zipfile.BadZipFile as error:
        raise ConfigError(f"convert: expected a folder or a .zip file, got {source}: {error}") from error


def _folder(folder: Path) -> Files:
    root = folder.resolve()
    found, seen = [], set()
    for path, below, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(path)) in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if not _hidden(name)]
        inside = os.path.relpath(path, root)
        found += [name if inside == "." else f"{inside}/{name}" for name in files if not _hidden(name)]
    base = _base(found)

    def read(name: str, limit: int) -> bytes:
        path = root / (base + name)
        if not path.resolve().is_relative_to(root):
            raise ValueError("leads outside the folder")
        if path.stat().st_size > limit:
            raise ValueError(f"larger than {limit} bytes")
        return path.read_bytes()

    return Files(str(folder), Names(name.removeprefix(base) for name in found if name.startswith(base)), read)


def _entry_name(info: zipfile.ZipInfo) -> str:
    """Names without the mark for UTF-8 are bytes, which the library shows by an old code page; backslashes are `/`."""
    name = info.filename
    if not info.flag_bits & 0x800:
        with suppress(UnicodeEncodeError):
            name = name.encode("cp437").decode("utf-8", "surrogateescape")
    return name.replace("\\", "/")


def _archive(archive: zipfile.ZipFile, title: str) -> Files:
    infos = {_entry_name(info): info for info in archive.infolist() if not info.is_dir()}
    entries = {name: info for name, info in infos.items() if not _hidden(name)}
    base = _base(entries)

    def read(name: str, limit: int) -> bytes:
        try:
            with archive.open(entries[base + name]) as file:
                data = file.read(limit + 1)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise ValueError(f"damaged or encrypted: {error}") from error
        except Exception as error:  # zlib, lzma and bz2 have exceptions of their own
            raise ValueError(str(error)) from error
        if len(data) > limit:
            raise ValueError(f"larger than {limit} bytes")
        return data

    return Files(title, Names(name.removeprefix(base) for name in entries if name.startswith(base)), read)
