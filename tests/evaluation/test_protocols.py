"""Protocols on tricky strings."""

import importlib.util
import string

import pytest

from rcmstr_fast.config import ConfigError
from rcmstr_fast.evaluation.protocols import PROTOCOLS, get_protocol

LONG = "a" * 26


@pytest.mark.parametrize(
    "name, label, target, dropped",
    [
        ("fewer_labels36", "It's-OK", "itsok", False),
        ("fewer_labels36", LONG, LONG, True),
        ("fewer_labels36", "a" * 25, "a" * 25, False),
        ("fewer_labels36", "'" * 26, "", True),
        ("fewer_labels36", "!!", "", False),
        ("fewer_labels36", "", "", False),
        ("fewer_labels36", "Café", "caf", False),
        ("dig36", LONG + "!", LONG, False),
        ("dig36", "It's", "its", False),
        ("dtrb36", "It's", "it's", True),
        ("dtrb36", "ITS", "its", False),
        ("dtrb36", LONG, LONG, True),
        ("dtrb36", "caf\u00e9", "caf\u00e9", True),
        ("dtrb36", "\uff11", "\uff11", True),
        ("cased94", "It's", "It's", False),
        ("cased94", string.digits + "Aa~", string.digits + "Aa~", False),
        ("cased94", "two words", "two words", True),
        ("cased94", "\u201cq\u201d", "\u201cq\u201d", True),
        ("cased94", LONG, LONG, True),
        ("exact", LONG + " \u00c9", LONG + " \u00c9", False),
        ("parseq36", "Caf\u00e9 \u00bd", "cafe12", False),
        ("parseq36", "?!", "", True),
        ("parseq62", "It's", "Its", False),
        ("parseq94", "It's a", "It'sa", False),
        ("parseq94", " ".join(LONG), LONG, True),
    ],
)
def test_label(name, label, target, dropped):
    text, reason = get_protocol(name).target(label)
    assert text == target
    assert (reason is not None) == dropped


def test_reasons_name_the_rule():
    assert "25" in get_protocol("dtrb36").drop_reason(LONG)
    assert "0-9a-z" in get_protocol("dtrb36").drop_reason("a.b")


def test_unknown():
    with pytest.raises(ConfigError, match=r"fewer_labels36.*got 'dtrb'"):
        get_protocol("dtrb")


def test_every_protocol_is_documented():
    assert all(name == protocol.name and "/" in protocol.meaning for name, protocol in PROTOCOLS.items())


@pytest.mark.skipif(importlib.util.find_spec("zhconv") is None, reason="the optional package zhconv is not installed")
def test_bctr():
    protocol = get_protocol("bctr")
    assert protocol.target("國\uff21\uff0cB\u3000 c") == ("国a,bc", None)
    assert protocol.target(LONG)[1] is None


def test_bctr_without_zhconv(monkeypatch):
    from rcmstr_fast.evaluation import protocols

    monkeypatch.setitem(__import__("sys").modules, "zhconv", None)
    protocols._simplified.cache_clear()
    with pytest.raises(ConfigError, match="zhconv"):
        get_protocol("bctr")
    protocols._simplified.cache_clear()
