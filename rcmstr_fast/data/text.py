"""What can be wrong with labels as they come: encodings, line ends, Unicode forms; and how it is mended."""

import codecs
import re
import unicodedata
from collections.abc import Iterable

NOT_UTF8 = "not UTF-8"
#: Fault -> how it shows in a label; in the order in which they are reported.
FAULTS = {
    "a line end": re.compile(r"[\r\n]"),
    "a NUL": re.compile("\0"),
    "a byte order mark": re.compile("\ufeff"),
    "spaces around it": re.compile(r"\A[^\S\r\n]|[^\S\r\n][\r\n]*\Z"),
}
DECOMPOSED = "decomposed characters (not in Unicode form NFC)"

_MARKS = [(codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")]
_SAMPLE = 1 << 16


def label_faults(label: bytes) -> list[str]:
    """What is wrong with the bytes of a label; empty for a sound one."""
    try:
        text = label.decode()
    except UnicodeDecodeError:
        return [NOT_UTF8]
    found = [fault for fault, pattern in FAULTS.items() if pattern.search(text)]
    return found if unicodedata.is_normalized("NFC", text) else [*found, DECOMPOSED]


def mended(label: bytes, encoding: str) -> tuple[str, list[str]]:
    """A label without the faults, and the faults it had.

    Line ends inside a label become one space; those around it, other spaces around it, NUL and byte order marks go.

    Args:
        label: its bytes.
        encoding: of labels that are not UTF-8.
    Raises:
        UnicodeDecodeError: the label is neither UTF-8 nor in this encoding.
    """
    faults = label_faults(label)
    text = label.decode(encoding if NOT_UTF8 in faults else "utf-8")
    if NOT_UTF8 in faults:
        faults += label_faults(text.encode())
    text = re.sub(r"[\r\n]+", " ", text.replace("\0", "").replace("\ufeff", ""))
    return unicodedata.normalize("NFC", text.strip()), faults


def marked_encoding(data: bytes) -> str | None:
    """The encoding that a byte order mark at the beginning tells; None without one."""
    return next((name for mark, name in _MARKS if data.startswith(mark)), None)


def guess_encoding(samples: Iterable[bytes]) -> str:
    """The likely encoding of texts that are not UTF-8; a guess, by what their bytes above 127 look like.

    Texts of the East Asian encodings have them in pairs, of Western ones singly, of Cyrillic ones in long runs.

    Args:
        samples: texts, the more the better.
    Returns:
        A name that `bytes.decode` knows, and that decodes all of the samples unless nothing does (then latin-1).
    """
    data = b"\n".join(samples)[:_SAMPLE]
    if marked := marked_encoding(data):
        return marked
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", data)]
    mean = sum(runs) / max(len(runs), 1)
    kana = [name for name in ("euc_jp", "shift_jis") if _share(data, name, "\u3040", "\u30ff") > 0.3]
    order = [*kana]
    if all(run % 2 == 0 for run in runs):
        order += ["gb18030"]
    order += ["cp1251", "big5", "cp1252"] if mean >= 3 else ["cp1252"] if mean < 1.5 else ["big5", "gb18030", "cp1252"]
    return next((name for name in order if _decoded(data, name) is not None), "latin-1")


def _decoded(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _share(data: bytes, encoding: str, first: str, last: str) -> float:
    """Share of the characters beyond ASCII that lie in a range, if the data are of this encoding."""
    strange = [c for c in _decoded(data, encoding) or "" if c > "\x7f"]
    return sum(first <= c <= last for c in strange) / max(len(strange), 1)
