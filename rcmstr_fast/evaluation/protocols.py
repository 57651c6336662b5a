"""Named comparison protocols: which words of a set count, and what is done to both strings before they are compared.

A published accuracy is only comparable under the protocol it was measured with; every row of a table prints it.
"""

import re
import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from rcmstr_fast.config import ConfigError

#: Longest label, in characters, that the protocols with a length limit keep.
MAX_LENGTH = 25

_NOT_36 = re.compile("[^0-9a-z]")
_NOT_62 = re.compile("[^0-9a-zA-Z]")
_NOT_94 = re.compile("[^" + re.escape(string.digits + string.ascii_letters + string.punctuation) + "]")
#: U+3000 and U+FF01..U+FF5E, the full-width forms of the printable ASCII characters.
_HALF_WIDTH = {0x3000: 0x20} | {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}


@dataclass(frozen=True)
class Protocol:
    """One protocol.

    Attributes:
        name: its name in tables and on the command line.
        meaning: what is dropped / what is done to the strings, in words.
        drop_reason: label -> why the word is left out of the set, or None where it counts.
        normalise: label or prediction -> the string that is compared.
        normalise_label: applied to the label alone, before `drop_reason` and `normalise`.
    """

    name: str
    meaning: str
    drop_reason: Callable[[str], str | None]
    normalise: Callable[[str], str]
    normalise_label: Callable[[str], str] = str

    def target(self, label: str) -> tuple[str, str | None]:
        """The normalised label and, where the word does not count, the reason."""
        label = self.normalise_label(label)
        return self.normalise(label), self.drop_reason(label)


def _keep_all(label: str) -> None:
    return None


def _too_long(label: str) -> str | None:
    return f"longer than {MAX_LENGTH} characters" if len(label) > MAX_LENGTH else None


def _outside_36(label: str) -> str | None:
    return _too_long(label) or ("a character outside 0-9a-z" if _NOT_36.search(label.lower()) else None)


def _outside_94(label: str) -> str | None:
    return _too_long(label) or ("a character outside the 94" if _NOT_94.search(label) else None)


def _outside_all_94(label: str) -> str | None:
    return _too_long(label) or (None if _NOT_94.sub("", label) else "none of the 94 characters")


def lower_alphanumeric(text: str) -> str:
    """Lower-case, then only 0-9 and a-z are left."""
    return _NOT_36.sub("", text.lower())


@cache
def _simplified() -> Callable[[str, str], str]:
    try:
        from zhconv import convert
    except ImportError as error:
        raise ConfigError(
            "protocol bctr needs the package zhconv (traditional to simplified); pip install zhconv"
        ) from error
    return convert


def chinese(text: str) -> str:
    """Full-width to half-width, traditional to simplified, lower-case, no spaces (the BCTR benchmark).

    Raises:
        ConfigError: the optional package zhconv is not installed.
    """
    text = _simplified()(text.translate(_HALF_WIDTH), "zh-cn")
    return text.lower().replace(" ", "")


def _parseq_label(label: str) -> str:
    """No white space; compatibility decomposition, then what is left outside ASCII is dropped."""
    label = "".join(label.split())
    return unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()


def _parseq(name: str, outside: re.Pattern[str], lower: bool) -> Protocol:
    def normalise(text: str) -> str:
        return outside.sub("", text.lower() if lower else text)

    def drop_reason(label: str) -> str | None:
        return _too_long(label) or (None if normalise(label) else "empty after normalisation")

    meaning = "labels > 25 and empty ones / no white space, NFKD to ASCII, other characters stripped" + (
        ", lower-case" if lower else ""
    )
    return Protocol(name, meaning, drop_reason, normalise, _parseq_label)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "fewer_labels36",
            "labels > 25 / lower-case, non-alphanumerics stripped from both",
            _too_long,
            lower_alphanumeric,
        ),
        Protocol("dig36", "nothing / lower-case, non-alphanumerics stripped from both", _keep_all, lower_alphanumeric),
        Protocol("dtrb36", "labels > 25 or with a character outside the 36 / lower-case", _outside_36, str.lower),
        Protocol("cased94", "labels > 25 or with a character outside the 94 / nothing", _outside_94, str),
        Protocol("exact", "nothing / nothing", _keep_all, str),
        Protocol(
            "bctr", "nothing / half-width, simplified Chinese, lower-case, no spaces, in both", _keep_all, chinese
        ),
        Protocol(
            "u14m36",
            "labels > 25 and those without any of the 94 / no spaces, lower-case, non-alphanumerics stripped",
            _outside_all_94,
            lower_alphanumeric,
        ),
        _parseq("parseq36", _NOT_36, lower=True),
        _parseq("parseq62", _NOT_62, lower=False),
        _parseq("parseq94", _NOT_94, lower=False),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol of this name.

    Raises:
        ConfigError: no such protocol.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    if name == "bctr":
        _simplified()
    return PROTOCOLS[name]
