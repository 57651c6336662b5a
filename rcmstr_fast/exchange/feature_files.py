"""Files of features, written batch by batch: safetensors, npz and Parquet.

In the first two the number of pictures stands before their features, but is known at the end alone: every column grows
in a temporary file beside the result, and is copied behind the head in blocks. Parquet has its index at the end.
"""

import contextlib
import json
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rcmstr_fast.config import ConfigError

ENDINGS = (".safetensors", ".npz", ".parquet")
DTYPES = {"float32": "F32", "float16": "F16"}
_BLOCK = 1 << 20
#: Characters of the longest name that an npz keeps whole.
_LONGEST = 512


@dataclass(frozen=True)
class Features:
    """A batch.

    Attributes:
        names: n paths (and keys).
        labels: n labels; None where there is none.
        levels: name -> [n, ..] float32.
    """

    names: list[str]
    labels: list[str | None]
    levels: dict[str, np.ndarray]


class FeatureFile:
    """What the kinds of files share.

    Attributes:
        count: pictures so far.
    """

    def __init__(self, path: Path, dtype: str, facts: dict[str, Any]) -> None:
        self.path, self.dtype, self.facts = path, np.dtype(dtype), facts
        self.count = 0
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, batch: Features) -> None:
        """Append a batch."""
        self.shapes = {name: values.shape[1:] for name, values in batch.levels.items()}
        self._add(batch)
        self.count += len(batch.names)

    def _add(self, batch: Features) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Write what stands before or behind the features."""
        raise NotImplementedError


class _Spooled(FeatureFile):
    """Columns in temporary files."""

    def __init__(self, path: Path, dtype: str, facts: dict[str, Any], folder: Path) -> None:
        super().__init__(path, dtype, facts)
        self._folder = folder
        self._columns: dict[str, BinaryIO] = {}

    def _column(self, name: str) -> BinaryIO:
        if name not in self._columns:
            self._columns[name] = open(self._folder / name, "w+b")  # noqa: SIM115 (closed in close)
        return self._columns[name]

    def _add(self, batch: Features) -> None:
        for name, values in batch.levels.items():
            self._column(name).write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        for name, texts in (("names", batch.names), ("labels", [label or "" for label in batch.labels])):
            encoded = [text.encode("utf-8", "replace") for text in texts]
            self._column(name).write(b"".join(encoded))
            self._column(f"{name}_length").write(np.array([len(x) for x in encoded], np.int64).tobytes())
        labelled = np.array([label is not None for label in batch.labels], np.uint8)
        self._column("labelled").write(labelled.tobytes())

    def _texts(self, name: str) -> Iterator[list[str]]:
        """The texts of a column in blocks."""
        data, lengths = self._column(name), self._column(f"{name}_length")
        data.seek(0)
        lengths.seek(0)
        while block := lengths.read(8 * 8192):
            yield [data.read(int(n)).decode("utf-8", "replace") for n in np.frombuffer(block, np.int64)]

    def close(self) -> None:
        """Close the temporary files."""
        for file in self._columns.values():
            file.close()


class _Safetensors(_Spooled):
    """One tensor a level, `names` and `labels` as UTF-8 bytes one after the other with `*_length`, and `labelled`."""

    def finish(self) -> None:
        """Head, then every column."""
        kinds: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for name, file in self._columns.items():
            size = file.seek(0, 2)
            if name in self.shapes:
                kinds[name] = DTYPES[str(self.dtype)], (self.count, *self.shapes[name]), size
            elif name.endswith("_length"):
                kinds[name] = "I64", (self.count,), size
            else:
                kinds[name] = "U8", (size,), size
        head: dict[str, Any] = {"__metadata__": {"rcmstr_fast": json.dumps(self.facts)}}
        place = 0
        ordered = sorted(kinds, key=lambda name: kinds[name][0] == "U8")  # bytes last: the others stay aligned
        for name in ordered:
            kind, shape, size = kinds[name]
            head[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, place + size]}
            place += size
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)
        with open(self.path, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in ordered:
                self._columns[name].seek(0)
                shutil.copyfileobj(self._columns[name], out, _BLOCK)


class _Npz(_Spooled):
    """One array a level, `names` and `labels` as text, `labelled` as bool, `facts` as JSON text."""

    def finish(self) -> None:
        """Every column as a member of the archive."""
        with zipfile.ZipFile(self.path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, shape in self.shapes.items():
                with self._member(archive, name, self.dtype, (self.count, *shape)) as out:
                    self._columns[name].seek(0)
                    shutil.copyfileobj(self._columns[name], out, _BLOCK)
            for name in ("names", "labels"):
                longest = max((len(text) for block in self._texts(name) for text in block), default=1)
                kind = np.dtype(f"<U{max(1, min(longest, _LONGEST))}")
                with self._member(archive, name, kind, (self.count,)) as out:
                    for block in self._texts(name):
                        out.write(np.array(block, kind).tobytes())
            with self._member(archive, "labelled", np.dtype(bool), (self.count,)) as out:
                self._columns["labelled"].seek(0)
                shutil.copyfileobj(self._columns["labelled"], out, _BLOCK)
            facts = np.array(json.dumps(self.facts))
            with self._member(archive, "facts", facts.dtype, ()) as out:
                out.write(facts.tobytes())

    @staticmethod
    @contextlib.contextmanager
    def _member(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[Any]:
        with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            yield out


class _Parquet(FeatureFile):
    """Columns `name`, `label` (null where there is none) and one list a level, flattened; shapes in the metadata."""

    def __init__(self, path: Path, dtype: str, facts: dict[str, Any]) -> None:
        super().__init__(path, dtype, facts)
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ConfigError("writing .parquet needs pyarrow: pip install rcmstr-fast[features]") from error
        self._arrow, self._parquet = pyarrow, pyarrow.parquet
        self._writer: Any = None

    def _add(self, batch: Features) -> None:
        arrow = self._arrow
        kind = arrow.from_numpy_dtype(self.dtype)
        columns = {
            "name": arrow.array([name.encode("utf-8", "replace").decode() for name in batch.names], arrow.string()),
            "label": arrow.array(batch.labels, arrow.string()),
        }
        for name, values in batch.levels.items():
            flat = np.ascontiguousarray(values, dtype=self.dtype).reshape(len(values), -1)
            columns[name] = arrow.FixedSizeListArray.from_arrays(arrow.array(flat.ravel(), kind), flat.shape[1])
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        metadata = {"rcmstr_fast": json.dumps({**self.facts, "shapes": shapes})}
        table = arrow.table(columns).replace_schema_metadata(metadata)
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self.path, table.schema)
        self._writer.write_table(table)

    def finish(self) -> None:
        """Write the index."""
        self.close()

    def close(self) -> None:
        """Close the writer, whatever is written."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()


@contextlib.contextmanager
def open_feature_file(path: Path, dtype: str, facts: dict[str, Any]) -> Iterator[FeatureFile]:
    """A file of the kind that its ending says; it takes the place of `path` when the block is left without an error.

    Args:
        path: ends with one of `ENDINGS`.
        dtype: float32 or float16.
        facts: JSON values kept in the file.
    Raises:
        ConfigError: another ending or dtype, no such folder, or pyarrow is missing.
    """
    if path.suffix not in ENDINGS:
        raise ConfigError(f"out must end with {', '.join(ENDINGS)}, got {path}")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be {' or '.join(DTYPES)}, got {dtype}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"out: the folder {path.absolute().parent} does not exist")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.absolute().parent) as folder:
        partial = Path(folder) / path.name
        made: Any
        if path.suffix == ".parquet":
            made = _Parquet(partial, dtype, facts)
        else:
            columns = Path(folder) / "columns"
            columns.mkdir()
            made = (_Safetensors if path.suffix == ".safetensors" else _Npz)(partial, dtype, facts, columns)
        try:
            yield made
        finally:
            made.close()
        partial.replace(path)


def texts_of(data: bytes, lengths: np.ndarray) -> list[str]:
    """The texts of `names` or `labels` of a safetensors file.

    Args:
        data: bytes of all texts.
        lengths: [n] int64, bytes of each.
    """
    ends = np.cumsum(lengths)
    return [data[end - length : end].decode() for end, length in zip(ends.tolist(), lengths.tolist())]
