"""The terminal is an observer: when it goes away the work goes on; stdlib only.

`rcmstr .. | head`, a closed ssh session, `2>&-`, a full disk behind `2> file`: what cannot be written there is dropped,
and the log of the run says so once.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

_log = logging.getLogger(__name__)


class Forgiving:
    """A text stream that never raises: its first failure goes to the log, and from then on it drops what it is given.

    Args:
        stream: where to write; None (the process was started without one): nowhere.

    Attributes:
        failure: what the first failed write said.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        """Write what the stream takes; characters that it does not know are escaped."""
        if self.stream is None or self.failure is not None:
            return len(text)
        try:
            self.stream.write(text)
        except UnicodeEncodeError as error:
            self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        if self.stream is None or self.failure is not None:
            return
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def isatty(self) -> bool:
        """Whether somebody may be looking at a terminal."""
        try:
            return self.stream is not None and self.failure is None and self.stream.isatty()
        except (OSError, ValueError):
            return False

    def _give_up(self, error: Exception) -> None:
        self.failure = error  # first, as the log comes back here
        _log.warning("the console is gone (%s); the work goes on without it", error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def forgiving(stream: TextIO | Forgiving | None) -> Forgiving:
    """The stream in a `Forgiving` one, once."""
    return stream if isinstance(stream, Forgiving) else Forgiving(stream)


@contextmanager
def kept(*, strict_output: bool = False) -> Iterator[None]:
    """While entered, stdout and stderr are forgiving; at the end nothing is left in them that could fail later.

    Args:
        strict_output: a failure of stdout is raised after all: its reader is all that a command works for.
    """
    _open_all_descriptors()
    before: tuple[Any, Any] = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):  # names of files are bytes; what is no UTF-8 is written as it was read
            utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    sys.stderr = cast(TextIO, forgiving(sys.stderr))
    if not strict_output:
        sys.stdout = cast(TextIO, forgiving(sys.stdout))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _settle(stream)


def _open_all_descriptors() -> None:
    """Where 0, 1 or 2 is closed the next file opened would take its number, and what C prints would land in it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _settle(stream: Any) -> None:
    """Flush; what cannot be flushed is thrown away, or the interpreter would end with status 120."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
            stream.flush()
        except (OSError, ValueError):
            pass
