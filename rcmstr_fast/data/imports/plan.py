"""What is to be converted: samples by part, and what is left out before any picture is looked at."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rcmstr_fast.data.imports.files import Files
from rcmstr_fast.data.lists import Listing

#: Reason -> the lines or files left out for it.
Problems = dict[str, list[str]]


@dataclass(frozen=True)
class Options:
    """What the user orders.

    Attributes:
        form: a format; empty: by content.
        lists: the lists of labels to read; empty: all that are found.
        encoding: of lists and labels that are not UTF-8; empty: guessed where labels are mended.
        mend: mend the faults of labels.
        split: auto: the parts that the set comes with; writers: a random tenth of the writers each for validation
            and test; none: everything into one LMDB.
        keep_err: IAM: also words whose segmentation is marked as wrong.
    """

    form: str = ""
    lists: Sequence[str] = ()
    encoding: str = ""
    mend: bool = False
    split: str = "auto"
    keep_err: bool = False


@dataclass(frozen=True)
class Fetched:
    """A sample as it is stored.

    Attributes:
        name: for messages.
        data: the encoded picture; None where it cannot be read.
        why: why not.
        label: its bytes; None: unlabelled.
    """

    name: str
    data: bytes | None
    why: str
    label: bytes | None


class Samples(Protocol):
    """The samples of one part, read in chunks, in threads."""

    def __len__(self) -> int: ...

    def fetch(self, chunk: range) -> list[Fetched]:
        """The samples of these places."""


@dataclass
class FileSamples:
    """Samples that are files: (file, label, name for messages), labels with surrogates for bytes that are not UTF-8."""

    files: Files
    entries: list[tuple[str, str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.entries)

    def fetch(self, chunk: range) -> list[Fetched]:
        """As in `Samples`."""
        return [self._one(*self.entries[i]) for i in chunk]

    def _one(self, file: str, label: str, name: str) -> Fetched:
        stored = label.encode("utf-8", "surrogateescape")
        try:
            return Fetched(name, self.files.picture(file), "", stored)
        except (OSError, ValueError) as error:
            return Fetched(name, None, str(error), stored)


@dataclass
class Plan:
    """What an import is made of.

    Attributes:
        form: the format, for messages: what it was taken for.
        parts: name of the part (empty: the only one) -> samples.
        total: entries of the set; the samples and the problems together.
        problems: entries left out.
        unlisted: pictures that nothing names.
    """

    form: str
    parts: dict[str, Samples] = field(default_factory=dict)
    total: int = 0
    problems: Problems = field(default_factory=dict)
    unlisted: int = 0

    def add(self, files: Files, part: str, file: str, label: str, name: str = "") -> None:
        """One more sample."""
        self.total += 1
        samples = self.parts.setdefault(part, FileSamples(files))
        assert isinstance(samples, FileSamples)
        samples.entries.append((file, label, name or file))

    def leave_out(self, reason: str, name: str) -> None:
        """One more entry that is not converted."""
        self.total += 1
        self.problems.setdefault(reason, []).append(name)

    def add_listing(self, files: Files, part: str, listing: Listing) -> None:
        """All lines of lists."""
        for file, label in listing.labels.items():
            self.add(files, part, file, label)
        for reason, lines in listing.problems.items():
            for line in lines:
                self.leave_out(reason, line)
