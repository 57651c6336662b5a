"""Files of a folder or an archive, found by what a list of labels calls them."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

#: What a picture's file name ends with, in lower case.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
#: Names of a list that are looked at, and of these those that all files are searched for.
_TRIED, _SEARCHED = 500, 20


def is_picture(name: str) -> bool:
    """Whether a file is taken for a picture: by its ending, and not hidden."""
    last = name.rpartition("/")[2]
    return last.lower().endswith(SUFFIXES) and not last.startswith(".")


def same_name(name: str) -> str:
    """One form for names that are the same to a reader: Unicode form NFC, no case."""
    return unicodedata.normalize("NFC", name).casefold()


def folder_of(name: str) -> str:
    """The folder of a file with a `/` at its end; empty for a file at the top."""
    folder, slash, _ = name.rpartition("/")
    return folder + slash


class Names:
    """Relative file names with `/`; names that are not UTF-8 have surrogates, as `os.fsdecode` makes them.

    Attributes:
        names: as given.
        cut: what a list puts before the names here, such as the folder in which its writer kept the set.
        put: what stands here before the names of a list, such as the folder of its pictures.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self.cut = self.put = ""
        self._loose: dict[str, str] | None = None

    def find(self, listed: str) -> str | None:
        """The file that a list means; None where there is none.

        Backslashes, `./`, names relative to `images/`, another Unicode form or case, `cut` and `put` do no harm. What
        fits several files fits none.
        """
        if listed in self.names:
            return listed
        clean = _clean(listed)
        if self.cut and clean.startswith(self.cut):
            clean = clean[len(self.cut) :]
        for name in (self.put + clean, clean, f"images/{clean}") if self.put else (clean, f"images/{clean}"):
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

    def learn(self, listed: Iterable[str], near: str = "") -> None:
        """Set `cut` and `put` by the first names of a list that are not found as they are.

        One of each for the whole list: with every name cut as it fits, names of different folders would become one.

        Args:
            listed: names, in the order of the list.
            near: the list's own folder, with a `/` at its end; preferred where its names fit in several.
        """
        self.cut, self.put = "", ""
        if near and any(near + _clean(name) in self.names for _, name in zip(range(_TRIED), listed)):
            self.put = near
            return
        cut: Counter[str] = Counter()
        put: Counter[str] = Counter()
        for number, name in zip(range(_TRIED), listed):
            if self.find(name) is not None:
                return
            clean = _clean(name)
            rests = ("/".join(PurePosixPath(clean).parts[i:]) for i in range(1, len(PurePosixPath(clean).parts)))
            if rest := next((rest for rest in rests if self.find(rest) is not None), ""):
                cut[clean.removesuffix(rest)] += 1
            elif number < _SEARCHED:
                put.update(file.removesuffix(clean) for file in self.names if file.endswith(f"/{clean}"))
        if cut:
            self.cut = cut.most_common(1)[0][0]
        elif put:
            most = max(put.values())
            self.put = min((prefix for prefix in put if put[prefix] == most), key=lambda prefix: (len(prefix), prefix))


def _clean(listed: str) -> str:
    return listed.replace("\\", "/").removeprefix("./")
