"""Data sets of others to LMDBs of the usual layout: sound pictures, labels as they are or mended, all counted."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rcmstr_fast.config import ConfigError, DataConfig
from rcmstr_fast.data.decode import BrokenImage, decode_picture
from rcmstr_fast.data.imports import handwriting, scene, textseg
from rcmstr_fast.data.imports.files import Files, open_files
from rcmstr_fast.data.imports.plan import Fetched, Options, Plan, Problems, Samples
from rcmstr_fast.data.lists import FORMATS, PAIRS
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.progress import in_threads
from rcmstr_fast.data.sets import UNLABELLED
from rcmstr_fast.data.source import walk
from rcmstr_fast.data.staging import staged_folder
from rcmstr_fast.data.text import NOT_UTF8, guess_encoding, label_faults, mended

_log = logging.getLogger(__name__)

#: Format of a whole set -> how it is recognised, and what makes its plan.
_SETS: dict[str, tuple[Callable[[Files], bool], Callable[[Files, Options], Plan]]] = {
    "iam": (handwriting.is_iam, handwriting.iam),
    "cvl": (handwriting.is_cvl, handwriting.cvl),
    "rimes": (handwriting.is_rimes, handwriting.rimes),
    "union14m": (scene.is_union14m, scene.union14m),
}
#: Everything that `Options.form` can be.
FORMS = ("lmdb", "textseg", *_SETS, *FORMATS)


@dataclass
class ConvertReport:
    """What became of a data set.

    Attributes:
        out: the folder made.
        form: what the source was taken for.
        total: entries of the source; `written` and all `problems` together.
        written: records (TextSeg: patches) written.
        parts: part -> records of these; the only part is called "".
        unlabelled: records of `written` without a label.
        problems: reason -> the entries left out for it.
        faults: what is wrong with labels -> how many; they are mended if that was ordered.
        mended: whether it was.
        unlisted: pictures that nothing names.
    """

    out: Path
    form: str = ""
    total: int = 0
    written: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    unlabelled: int = 0
    problems: Problems = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    mended: bool = False
    unlisted: int = 0

    def leave_out(self, reason: str, name: str) -> None:
        """Note an entry that is not converted."""
        self.problems.setdefault(reason, []).append(name)


def convert(source: str | Path, out: str | Path, options: Options | None = None) -> ConvertReport:
    """Pack a set of labelled pictures into an LMDB, or one a part; TextSeg becomes folders of patches.

    Every picture is decoded once: what training could not show is left out. The encoded pictures are copied unchanged.

    Args:
        source: a folder or .zip with lists of labels, IAM, CVL, RIMES, Union14M-L or TextSeg; or LMDBs.
        out: folder to make.
        options: what is ordered; None: everything by content.
    Returns:
        What was written and what was left out, by reason and name.
    Raises:
        ConfigError: no such input, nothing in it is recognised, nothing to convert, or `out` exists.
    """
    options = options or Options()
    if options.form and options.form not in FORMS:
        raise ConfigError(f"convert: format must be one of {', '.join(FORMS)}, got {options.form}")
    report = ConvertReport(Path(out), mended=options.mend)
    if options.form == "lmdb" or (not options.form and _holds_lmdb(Path(source))):
        return _write(scene.databases(str(source), options), report, options, str(source))
    with open_files(source) as files:
        if options.form == "textseg" or (not options.form and textseg.is_textseg(files)):
            return _cut(files, report, options)
        if not options.form and PAIRS in files.names.names:
            raise ConfigError(
                f"convert: {files.title} has pictures with masks ({PAIRS}), which rcmstr segment takes as they are "
                "(unpack an archive); convert makes sets of words of lists of labels"
            )
        return _write(_plan(files, options), report, options, str(source))


def _holds_lmdb(source: Path) -> bool:
    return source.suffix in (".mdb", ".lmdb") if source.is_file() else bool(walk(source).databases)


def _plan(files: Files, options: Options) -> Plan:
    chosen = options.form
    if not chosen and not options.lists:
        chosen = next((name for name, (fits, _) in _SETS.items() if fits(files)), "")
    if chosen in _SETS:
        if not _SETS[chosen][0](files):
            raise ConfigError(f"convert: expected the layout of {chosen} in {files.title}; docs/data.md describes it")
        return _SETS[chosen][1](files, options)
    if options.split == "writers":
        raise ConfigError(f"convert: split=writers is for IAM and CVL, got {files.title}, which is neither")
    return scene.lists(files, options)


def _write(plan: Plan, report: ConvertReport, options: Options, source: str) -> ConvertReport:
    report.form, report.total, report.unlisted = plan.form, plan.total, plan.unlisted
    report.problems = {reason: list(names) for reason, names in plan.problems.items()}
    _log.info("%s: %s", source, plan.form)
    with staged_folder(report.out) as folder:
        for part, samples in plan.parts.items():
            if not (folder / part).resolve().is_relative_to(folder.resolve()):
                raise ConfigError(f"convert: a part of {source} would be written outside of {report.out}: {part!r}")
            if count := write_lmdb(folder / part, _records(samples, report, options)):
                report.parts[part] = count
            else:
                (folder / part / "data.mdb").unlink()
                (folder / part / "lock.mdb").unlink(missing_ok=True)
        _refuse_nothing(report, source)
    return report


def _refuse_nothing(report: ConvertReport, source: str) -> None:
    if not report.written:
        reasons = ", ".join(f"{len(names)} {reason}" for reason, names in report.problems.items())
        raise ConfigError(f"convert: nothing to convert in {source} ({reasons or 'the list is empty'})")


def _records(samples: Samples, report: ConvertReport, options: Options) -> Iterator[tuple[bytes, str | None]]:
    limits = DataConfig()

    def part(chunk: range) -> list[tuple[Fetched, str]]:
        return [(one, _fault(one, limits)) for one in samples.fetch(chunk)]

    encoding = options.encoding
    for fetched in in_threads(part, len(samples), 0, "converting"):
        if options.mend and not encoding:
            wrong = [one.label for one, _ in fetched if one.label and NOT_UTF8 in label_faults(one.label)]
            encoding = guess_encoding(wrong) if wrong else ""
        for one, fault in fetched:
            if fault:
                report.leave_out(fault.partition(": ")[0], f"{one.name}: {fault.partition(': ')[2]}".removesuffix(": "))
                continue
            assert one.data is not None
            label, why = _label(one.label, report, options.mend, encoding)
            if why:
                report.leave_out(why, one.name)
                continue
            report.written += 1
            report.unlabelled += not label
            yield one.data, label or None


def _fault(one: Fetched, limits: DataConfig) -> str:
    """`reason: details` of a sample whose picture cannot be shown; empty for a sound one."""
    if one.data is None:
        return f"file unreadable: {one.why}"
    try:
        decode_picture(one.data, max_pixels=limits.max_pixels, min_side=limits.min_side)
    except BrokenImage as error:
        return f"damaged picture: {error}"
    return ""


def _label(label: bytes | None, report: ConvertReport, mend: bool, encoding: str) -> tuple[str, str]:
    """The label to write (empty: none), or why its record is left out; its faults are counted."""
    if label in (None, b"", UNLABELLED):
        return "", ""
    assert label is not None
    faults = label_faults(label)
    if mend and faults:
        try:
            text, faults = mended(label, encoding)
        except (UnicodeDecodeError, LookupError):
            return "", f"label neither UTF-8 nor {encoding}"
    elif NOT_UTF8 in faults:
        return "", "label not UTF-8 (--mend mends it)"
    else:
        text = label.decode()
    report.faults.update(faults)
    return text, ""


def _cut(files: Files, report: ConvertReport, options: Options) -> ConvertReport:
    report.form = "TextSeg: word patches, cut by the boxes of the words"
    _log.info("%s: %s", files.title, report.form)
    with staged_folder(report.out) as folder:
        cut = textseg.cut_patches(files, folder, split=options.split != "none")
        report.total, report.problems, report.parts = cut.total, cut.problems, cut.parts
        report.written = sum(cut.parts.values())
        _refuse_nothing(report, files.title)
    return report
