"""Files of a folder or an archive, found by what a list of labels calls them."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

#: What a picture's file name ends with, in lower case.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
_TRIED = 500


def is_picture(name: str) -> bool:
    """Whether a file is taken for a picture: by its ending, and not hidden."""
    last = name.rpartition("/")[2]
    return last.lower().endswith(SUFFIXES) and not last.startswith(".")


def same_name(name: str) -> str:
    """One form for names that are the same to a reader: Unicode form NFC, no case."""
    return unicodedata.normalize("NFC", name).casefold()


class Names:
    """Relative file names with `/`; names that are not UTF-8 have surrogates, as `os.fsdecode` makes them.

    Attributes:
        names: as given.
        prefix: what lists put before the names here, such as the folder in which their writer kept the set.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self.prefix = ""
        self._loose: dict[str, str] | None = None

    def find(self, listed: str) -> str | None:
        """The file that a list means; None where there is none.

        Backslashes, `./`, names relative to `images/`, another Unicode form or case, and `prefix` do no harm. What
        fits several files fits none.
        """
        if listed in self.names:
            return listed
        clean = listed.replace("\\", "/").removeprefix("./")
        if self.prefix and clean.startswith(self.prefix):
            clean = clean[len(self.prefix) :]
        for name in (clean, f"images/{clean}"):
            if name in self.names:
                return name
            if found := self._loosely().get(same_name(name)):
                return found
        return None

    def _loosely(self) -> dict[str, str]:
        if self._loose is None:
            self._loose = {}
            for name in self.names:
                key = same_name(name)
                self._loose[key] = "" if key in self._loose else name
        return self._loose

    def learn_prefix(self, listed: Iterable[str]) -> None:
        """Find out what a list puts before the names here, from the first names that are not found as they are.

        One prefix for the whole list: with each name cut as it fits, names of different folders would become one.
        """
        self.prefix = ""
        seen: Counter[str] = Counter()
        for _, name in zip(range(_TRIED), listed):
            if self.find(name) is not None:
                return
            parts = PurePosixPath(name.replace("\\", "/")).parts
            for cut in range(1, len(parts)):
                rest = "/".join(parts[cut:])
                if self.find(rest) is not None:
                    seen[name.replace("\\", "/").removeprefix("./").removesuffix(rest)] += 1
                    break
        if seen:
            self.prefix = seen.most_common(1)[0][0]
