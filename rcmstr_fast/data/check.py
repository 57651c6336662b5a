"""Looks at every record of a data set: broken pictures and faulty labels by name, and what the set consists of."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from rcmstr_fast.charset import Charset
from rcmstr_fast.data.decode import BrokenImage, decode_picture, picture_size
from rcmstr_fast.data.progress import in_threads
from rcmstr_fast.data.source import ImageSet, ImageSource
from rcmstr_fast.data.text import NOT_UTF8, guess_encoding, label_faults

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_SHOWN = 10


@dataclass
class LabelFault:
    """Labels with one fault.

    Attributes:
        count: how many.
        records: the first of them by name.
        guess: the encoding that labels which are not UTF-8 look like.
    """

    count: int
    records: list[str]
    guess: str = ""


@dataclass
class CheckReport:
    """Result of `check`.

    Attributes:
        total: records looked at.
        broken: (name, reason) of every broken picture, in order.
        labelled: records with a label.
        labels: fault -> the labels that have it; see `text.FAULTS`.
    """

    total: int
    broken: list[tuple[str, str]]
    labelled: int = 0
    labels: dict[str, LabelFault] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return not (self.broken or self.labels)

    def note(self, faults: Iterable[str], name_of: Callable[[int], str], record: int) -> None:
        """Count the faults of a record's label; the first few records of each fault are named."""
        for fault in faults:
            seen = self.labels.setdefault(fault, LabelFault(0, []))
            seen.count += 1
            if len(seen.records) < _SHOWN:
                seen.records.append(name_of(record))


def check(source: ImageSource, *, max_pixels: int, min_side: int, threads: int = 0) -> CheckReport:
    """Decode every record and look at every label.

    Args:
        source: the records.
        max_pixels: larger pictures are broken.
        min_side: pictures with a shorter side, in pixels, are broken.
        threads: decoding threads; 0: as many as `env.threads()`.
    """

    def reason(data: bytes | None) -> str | None:
        try:
            if data is None:
                raise BrokenImage("missing or unreadable record")
            decode_picture(data, max_pixels=max_pixels, min_side=min_side)
        except BrokenImage as error:
            return str(error)
        return None

    def part(chunk: range) -> tuple[list[tuple[int, str]], list[tuple[int, bytes]]]:
        source.prefetch(chunk)
        found = ((i, reason(data)) for i, data in zip(chunk, source.read(chunk)))
        labels = [(i, label) for i, label in zip(chunk, source.raw_labels(chunk)) if label]
        return [(i, why) for i, why in found if why is not None], labels

    report = CheckReport(len(source), [])
    foreign: list[bytes] = []
    for broken, labels in in_threads(part, len(source), threads, "checking"):
        report.broken += [(source.name(i), why) for i, why in broken]
        report.labelled += len(labels)
        for i, label in labels:
            faults = label_faults(label)
            report.note(faults, source.name, i)
            if NOT_UTF8 in faults and len(foreign) < 1000:
                foreign.append(label)
    if foreign:
        report.labels[NOT_UTF8].guess = guess_encoding(foreign)
    return report


@dataclass
class SetStats:
    """What one LMDB or folder consists of.

    Attributes:
        name: of the set.
        images: number of records.
        unreadable: records whose size cannot be read.
        unlabelled: share of records without a label.
        width: quantiles of the width in pixels, by name such as "50%".
        height: quantiles of the height in pixels.
        aspect: quantiles of width / height.
        label_length: number of labels by length in characters.
        characters: number of different characters in the labels.
        inside: charset name -> share of the labels that have only its characters.
        outside: the most frequent characters outside the charset asked for, with their counts.
    """

    name: str
    images: int
    unreadable: int
    unlabelled: float
    width: dict[str, float]
    height: dict[str, float]
    aspect: dict[str, float]
    label_length: dict[int, int]
    characters: int
    inside: dict[str, float]
    outside: dict[str, int] = field(default_factory=dict)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not values.size:
        return {}
    return {f"{100 * q:g}%": round(float(v), 3) for q, v in zip(_QUANTILES, np.quantile(values, _QUANTILES))}


def set_stats(found: ImageSet, charset: str = "94", threads: int = 0) -> SetStats:
    """Sizes, labels and characters of one set; pictures are not decoded.

    Args:
        found: the set.
        charset: name or file whose coverage is reported in detail.
        threads: 0: as many as `env.threads()`.
    Raises:
        ConfigError: the charset is unknown.
    """
    charsets = {name: Charset.load(name) for name in dict.fromkeys(("36", "62", "94", charset))}
    sizes: list[tuple[int, int]] = []
    lengths: Counter[int] = Counter()
    letters: Counter[str] = Counter()
    inside: Counter[str] = Counter()

    def part(chunk: range) -> tuple[list[tuple[int, int] | None], Sequence[str | None]]:
        return [picture_size(data) for data in found.read(chunk)], found.labels(chunk)

    for part_sizes, labels in in_threads(part, len(found), threads, "reading"):
        sizes += [size for size in part_sizes if size is not None]
        for label in labels:
            if label is not None:
                lengths[len(label)] += 1
                letters.update(label)
                inside.update(name for name, known in charsets.items() if not known.missing(label))
    labelled = sum(lengths.values())
    wide, high = np.array(sizes, dtype=np.float64).reshape(-1, 2).T
    strange = Counter({letter: n for letter, n in letters.items() if letter not in charsets[charset]})
    return SetStats(
        name=found.name,
        images=len(found),
        unreadable=len(found) - len(sizes),
        unlabelled=1 - labelled / max(len(found), 1),
        width=_quantiles(wide),
        height=_quantiles(high),
        aspect=_quantiles(wide / np.maximum(high, 1)),
        label_length=dict(sorted(lengths.items())),
        characters=len(letters),
        inside={name: inside[name] / labelled for name in charsets} if labelled else {},
        outside=dict(strange.most_common(30)),
    )


def characters_of(source: ImageSource, normalise: Callable[[str], str] = str) -> str:
    """Every character of the normalised labels, the most frequent first; line ends and NUL are left out."""
    letters: Counter[str] = Counter()
    for first in range(0, len(source), 4096):
        chunk = np.arange(first, min(first + 4096, len(source)))
        letters.update("".join(normalise(label) for label in source.labels(chunk) if label))
    return "".join(sorted((c for c in letters if c not in "\r\n\0"), key=lambda c: (-letters[c], c)))


def stats_table(stats: Sequence[SetStats]) -> str:
    """The statistics as text."""
    lines = []
    for one in stats:
        lines.append(f"{one.name}: {one.images} images, {one.unlabelled:.1%} unlabelled, {one.unreadable} unreadable")
        for name in ("width", "height", "aspect"):
            row = "  ".join(f"{quantile} {value:g}" for quantile, value in asdict(one)[name].items())
            lines.append(f"  {name:<8}{row}")
        if one.label_length:
            lengths = np.repeat(list(one.label_length), list(one.label_length.values()))
            row = "  ".join(f"{quantile} {value:g}" for quantile, value in _quantiles(lengths).items())
            lines.append(f"  {'length':<8}{row}")
            covered = ", ".join(f"{share:.1%} in {name}" for name, share in one.inside.items())
            lines.append(f"  labels  {one.characters} different characters; {covered}")
        if one.outside:
            row = "  ".join(f"{letter!r} {count}" for letter, count in one.outside.items())
            lines.append(f"  outside {row}")
    return "\n".join(lines)
