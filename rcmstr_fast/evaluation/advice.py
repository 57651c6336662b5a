"""Which protocol and which charset fit the labels of a set, for warnings that say what to do."""

from collections.abc import Sequence

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation.protocols import Protocol, get_protocol

#: Share of a set that a protocol may empty, and that a charset may lack, before a warning.
_EMPTIED, _LACKING = 0.1, 0.5
_FITS = 0.9
_CJK = ("\u3400", "\u9fff")


def emptied(protocol: Protocol, label: str) -> bool:
    """Whether the word counts under the protocol although nothing is left of its label."""
    target, reason = protocol.target(label)
    return reason is None and not target and bool(label)


def fitting_protocol(labels: Sequence[str]) -> str:
    """The strictest of cased94, bctr (Chinese) and exact that leaves nine tenths of the labels something to read."""
    chinese = 2 * sum(any(_CJK[0] <= c <= _CJK[1] for c in label) for label in labels) > len(labels)
    for name in ("cased94", "bctr") if chinese else ("cased94",):
        if name == "bctr":
            return name
        if _share(get_protocol(name), labels) >= _FITS:
            return name
    return "exact"


def emptied_warning(what: str, protocol: Protocol, labels: Sequence[str]) -> str:
    """What to say of a set that a protocol empties by more than a tenth; empty where it does not.

    Args:
        what: name of the set.
        protocol: applied to it.
        labels: as stored, of all labelled words.
    """
    count = sum(emptied(protocol, label) for label in labels)
    if count <= _EMPTIED * len(labels):
        return ""
    return (
        f"{what}: {protocol.name} leaves nothing of {count} of {len(labels)} labels, which then count as read by a "
        f"prediction of nothing; {fitting_protocol(labels)} fits this set"
    )


def charset_warning(what: str, protocol: Protocol, charset: Charset, labels: Sequence[str], kept: int) -> str:
    """What to say of training words that protocol and charset leave too few of; empty where they do not.

    Args:
        what: name of the set.
        protocol: applied to the labels first.
        charset: of the decoder.
        labels: as stored, of all labelled words.
        kept: how many of them are used.
    """
    if kept >= _LACKING * len(labels):
        return ""
    return (
        f"{what}: ONLY {kept} of {len(labels)} labels are left by protocol {protocol.name} and the charset of "
        f"{len(charset)} characters; {_better(protocol, labels)}"
    )


def _better(protocol: Protocol, labels: Sequence[str]) -> str:
    names = dict.fromkeys([protocol.name, fitting_protocol(labels)])
    found: set[str] = set()
    for name in names:
        try:
            targets = [get_protocol(name).target(label)[0] for label in labels]
        except ConfigError:  # an optional package is not installed
            continue
        for charset in ("36", "62", "94"):
            known = Charset.load(charset)
            left = sum(bool(target) and not known.missing(target) for target in targets)
            if left >= _FITS * len(labels):
                return f"charset={charset} with protocols=[{name}] keeps {left}"
        found = set("".join(targets))
    own = f"a charset file with the {len(found)} characters of these labels"
    return f"{own}, with protocols=[{list(names)[-1]}], keeps all"


def _share(protocol: Protocol, labels: Sequence[str]) -> float:
    """Share of the labels that count and of which something is left."""
    targets = [protocol.target(label) for label in labels]
    return sum(bool(target) and reason is None for target, reason in targets) / max(1, len(labels))
