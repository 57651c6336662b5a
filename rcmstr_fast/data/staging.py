"""Output folders that appear complete or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rcmstr_fast.config import ConfigError


@contextmanager
def staged_folder(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out`, renamed to `out` when the block ends without an error.

    A killed process leaves only the temporary folder (`.NAME.partial-*`), never an incomplete `out`.

    Raises:
        ConfigError: `out` exists and is no empty folder, or its parent cannot be written.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"expected a new or empty folder to write to, got {out}, which exists")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise ConfigError(f"expected a folder that can be written, got {out}: {error}") from error
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's are private
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
