"""Lists of labels, Union14M-L, and LMDBs (BCTR, or any in the usual layout)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.imports.files import Files
from rcmstr_fast.data.imports.plan import Fetched, Options, Plan
from rcmstr_fast.data.lists import FORMATS, Listing, decoded, read_lists, recognise
from rcmstr_fast.data.names import is_picture
from rcmstr_fast.data.sets import ImageSet
from rcmstr_fast.data.source import open_sources

_UNION14M = re.compile(r"(?:.*/)?\w*_annos?/(?:.*/)?([^/]+)\.(jsonl?)|(?:.*/)?([^/]+)/annotation\.(jsonl?)")


def lists(files: Files, options: Options) -> Plan:
    """Pictures with lists of labels at the top, in any form of `FORMATS`.

    Raises:
        ConfigError: there is no list.
    """
    order = options.form if options.form in FORMATS else ""
    listing = read_lists(files.names, files.text, order=order, chosen=options.lists, encoding=options.encoding)
    if not listing.lists:
        raise ConfigError(
            f"convert: expected a list of labels (labels.tsv, gt.txt, metadata.csv, ..) in {files.title}, "
            "found none that names its pictures"
        )
    plan = Plan(listing.describe())
    plan.add_listing(files, "", listing)
    plan.unlisted = sum(is_picture(name) and name not in listing.labels for name in files.names.names)
    return plan


def _union14m_lists(files: Files) -> dict[str, str]:
    """Part -> list; of both versions of an annotation the JSON document counts."""
    found: dict[str, str] = {}
    for name in sorted(files.names.names):
        if match := _UNION14M.fullmatch(name):
            part = match[1] or match[3]
            if part not in found or name.endswith(".json"):
                found[part] = name
    return found


def is_union14m(files: Files) -> bool:
    """Whether there are JSON lists in *_annos/ (Union14M-L) or SET/annotation.json (its benchmark)."""
    return bool(_union14m_lists(files))


def union14m(files: Files, options: Options) -> Plan:
    """Union14M-L and its benchmark: a part a list, such as train_challenging, named by it.

    A list is MMOCR's JSON document (data_list with img_path and instances) or JSON lines (filename, text).

    Raises:
        ConfigError: a split by writers is ordered.
    """
    if options.split == "writers":
        raise ConfigError("convert: split=writers is for handwriting, got Union14M")
    plan = Plan("Union14M: ")
    for part, name in _union14m_lists(files).items():
        text = decoded(files.text(name), options.encoding)
        listing = Listing()
        listing.add(name, text, recognise(text, files.names, name.rpartition("/")[0] + "/")[0], files.names)
        plan.add_listing(files, part if options.split == "auto" else "", listing)
        plan.form += f"{'; ' if plan.total > listing.total else ''}{listing.describe()}"
    return plan


@dataclass
class SetSamples:
    """The records of one LMDB."""

    found: ImageSet

    def __len__(self) -> int:
        return len(self.found)

    def fetch(self, chunk: range) -> list[Fetched]:
        """As in `Samples`."""
        self.found.prefetch(np.asarray(chunk))
        read = zip(chunk, self.found.read(chunk), self.found.raw_labels(chunk))
        return [Fetched(self.found.record_name(i), data, "missing record", label) for i, data, label in read]


def databases(source: str, options: Options) -> Plan:
    """All records of the LMDBs of a root; several stay apart, by their path.

    Raises:
        ConfigError: the root cannot be read, or a split by writers is ordered.
    """
    if options.split == "writers":
        raise ConfigError("convert: split=writers is for handwriting, got an LMDB, which does not name writers")
    sets: Sequence[ImageSet] = open_sources([source]).sets
    plan = Plan(f"{len(sets)} LMDB{'s' if len(sets) > 1 else ''} in the usual layout", total=sum(map(len, sets)))
    plan.parts = {found.name if len(sets) > 1 else "": SetSamples(found) for found in sets}
    return plan
