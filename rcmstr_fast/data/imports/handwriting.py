"""IAM, CVL and RIMES: words of handwriting with their writers and parts."""

import hashlib
import re
from collections.abc import Callable

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.imports.files import Files
from rcmstr_fast.data.imports.plan import Options, Plan
from rcmstr_fast.data.lists import Listing, decoded
from rcmstr_fast.data.names import is_picture

_IAM_WORDS = re.compile(r"(?:.*/)?words\.txt")
_IAM_FORMS = re.compile(r"(?:.*/)?forms\.txt")
_IAM_XML = re.compile(r"(?:.*/)?xml/([^/]+)\.xml")
_IAM_ID = re.compile(r"(?P<line>(?P<form>[a-z]\d\d-\d+[a-z]?)-\d+)-\d+")
_IAM_SPLIT = re.compile(r"(?:.*/)?(tr|va|te)[a-z]*_?(?:set)?(\d?)\.(?:txt|lst|uttlist)")
_WRITER = re.compile(rb'writer-id="([^"]*)"')
_CVL_WORD = re.compile(r"(?P<writer>\d+)-\d+-\d+-\d+-(?P<label>.+)\.\w+")
_CVL_PART = re.compile(r"(?:.*/)?(train|test)set/")
_RIMES_LIST = re.compile(r"(?:.*/)?gro?un[dt]_?truth_(train|valid|test)\w*\.txt")
_NAMES = {"tr": "train", "va": "val", "te": "test"}
#: Percent of the writers for training and, from there on, for validation; the rest is for test.
_TRAIN, _VAL = 80, 90


def _writer_part(writer: str) -> str:
    """Part of a writer, by a hash of the name: the same whatever else is in the set."""
    place = (
        int.from_bytes(hashlib.blake2b(writer.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") % 100
    )
    return "train" if place < _TRAIN else "val" if place < _VAL else "test"


def is_iam(files: Files) -> bool:
    """Whether a words.txt begins with lines of IAM."""
    lists = [name for name in files.names.names if _IAM_WORDS.fullmatch(name)]
    return any(_iam_words(decoded(files.text(name))[:4000], some=True) for name in lists)


def _iam_words(text: str, some: bool = False) -> list[tuple[str, bool, str]]:
    """(word id, segmented well, text) of each line; lines of another form have an empty id, and the line as text.

    A line is: id, ok or err, grey level, x, y, width, height, tag, text; some copies count components after the level.
    """
    words = []
    for line in text.split("\n"):
        line = line.rstrip("\r")
        if not line.strip() or line.startswith("#"):
            continue
        cells = line.split(" ")
        numbers = next((i for i, cell in enumerate(cells[2:]) if not re.fullmatch(r"-?\d+", cell)), 0)
        if _IAM_ID.fullmatch(cells[0]) and cells[1:2] in (["ok"], ["err"], ["er"]) and numbers >= 5:
            words.append((cells[0], cells[1] == "ok", " ".join(cells[3 + numbers :])))
        elif some:
            continue
        else:
            words.append(("", False, line))
    return words


def iam(files: Files, options: Options) -> Plan:
    """IAM's words: `words.txt` (plain text, no XML needed) and one picture a word, named by its id.

    Parts come from the split lists beside it (trainset.txt, validationset1.txt, .., or tr.lst, va1.lst, ..; lines are
    ids of lines or forms), writers from forms.txt or, without it, from xml/FORM.xml.

    Raises:
        ConfigError: a split by writers is ordered and the writers are unknown.
    """
    every = sorted(files.names.names)
    (name, *_) = sorted((name for name in every if _IAM_WORDS.fullmatch(name)), key=len)
    plan = Plan(f"IAM: {name}")
    pictures = {file.rpartition("/")[2].rpartition(".")[0]: file for file in every if is_picture(file)}
    split = _iam_split(files, options)
    for word, good, label in _iam_words(decoded(files.text(name), options.encoding)):
        found = _IAM_ID.fullmatch(word)
        if not found:
            plan.leave_out("not a line of words.txt", label[:60])
        elif not good and not options.keep_err:
            plan.leave_out("segmentation marked err", word)
        elif word not in pictures:
            plan.leave_out("file missing", word)
        elif (part := split(found["line"], found["form"])) is None:
            plan.leave_out("in none of the split lists", word)
        else:
            plan.add(files, part, pictures[word], label, word)
    return plan


def _iam_split(files: Files, options: Options) -> Callable[[str, str], str | None]:
    """(line id, form id) -> part, None where a word belongs to none."""
    if options.split == "none":
        return lambda line, form: ""
    if options.split == "writers":
        writers = _iam_writers(files)
        if not writers:
            raise ConfigError(
                f"convert: split=writers must have IAM's forms.txt or xml/, found neither in {files.title}"
            )
        return lambda line, form: _writer_part(writers[form]) if form in writers else None
    parts: dict[str, str] = {}
    for name in sorted(files.names.names):
        if found := _IAM_SPLIT.fullmatch(name):
            ids = decoded(files.text(name)).split()
            if ids and all(re.fullmatch(r"[a-z]\d\d-\d+[a-z]?(-\d+)?", one) for one in ids):
                parts |= dict.fromkeys(ids, _NAMES[found[1]] + found[2])
    if not parts:
        return lambda line, form: ""
    return lambda line, form: parts.get(line, parts.get(form))


def _iam_writers(files: Files) -> dict[str, str]:
    """Form id -> writer."""
    every = sorted(files.names.names)
    writers: dict[str, str] = {}
    for name in filter(_IAM_FORMS.fullmatch, every):
        lines = [line.split() for line in decoded(files.text(name)).splitlines() if not line.startswith("#")]
        writers |= {cells[0]: cells[1] for cells in lines if len(cells) > 1}
    for name in every if not writers else ():
        if (form := _IAM_XML.fullmatch(name)) and (writer := _WRITER.search(files.text(name))):
            writers[form[1]] = writer[1].decode("utf-8", "surrogateescape")
    return writers


def is_cvl(files: Files) -> bool:
    """Whether there are pictures named as CVL's words, in trainset/ or testset/."""
    return any(_cvl_word(name) and _CVL_PART.match(name) for name in files.names.names)


def _cvl_word(name: str) -> re.Match[str] | None:
    return _CVL_WORD.fullmatch(name.rpartition("/")[2]) if is_picture(name) else None


def cvl(files: Files, options: Options) -> Plan:
    """CVL's words, with the text in the file name: WRITER-TEXT-LINE-WORD-LABEL.tif; the parts are its two folders."""
    plan = Plan("CVL: words by their file names")
    for name in sorted(files.names.names):
        found = _cvl_word(name)
        if found is None:
            plan.unlisted += is_picture(name)
            continue
        part = _CVL_PART.match(name)
        if options.split == "writers":
            plan.add(files, _writer_part(found["writer"]), name, found["label"])
        else:
            plan.add(files, part[1] if part and options.split == "auto" else "", name, found["label"])
    return plan


def _rimes_lists(files: Files) -> dict[str, str]:
    """List -> its part."""
    found = {name: _RIMES_LIST.fullmatch(name) for name in sorted(files.names.names)}
    names = {"train": "train", "valid": "val", "test": "test"}
    return {name: names[match[1]] for name, match in found.items() if match}


def is_rimes(files: Files) -> bool:
    """Whether there are lists named as those of RIMES-2011's words."""
    return bool(_rimes_lists(files))


def rimes(files: Files, options: Options) -> Plan:
    """RIMES-2011's words: a list a part (ground_truth_*_icdar2011.txt, lines 'file label') and its folder of pictures.

    Raises:
        ConfigError: a split by writers is ordered; the set does not name them.
    """
    if options.split == "writers":
        raise ConfigError("convert: split=writers is not possible with RIMES, which does not name its writers")
    lists = _rimes_lists(files)
    plan = Plan(f"RIMES: {', '.join(lists)}")
    for name, part in lists.items():
        listing = Listing()
        listing.add(name, decoded(files.text(name), options.encoding), "space", files.names)
        plan.add_listing(files, part if options.split == "auto" else "", listing)
    return plan
