"""Faults of labels: found, named, mended."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcmstr_fast.data.text import DECOMPOSED, NOT_UTF8, guess_encoding, label_faults, mended

CASES = [
    (b"sound", [], "sound"),
    ("Wörd 中".encode(), [], "Wörd 中"),
    (b"abc\n", ["a line end"], "abc"),
    (b"abc\r\n", ["a line end"], "abc"),
    (b"You\rx", ["a line end"], "You x"),
    (b"abc\0", ["a NUL"], "abc"),
    (b" abc ", ["spaces around it"], "abc"),
    ("\u3000中".encode(), ["spaces around it"], "中"),
    (b"abc \r\n", ["a line end", "spaces around it"], "abc"),
    ("\ufeffabc".encode(), ["a byte order mark"], "abc"),
    ("e\u0301t\u00e9".encode(), [DECOMPOSED], "\u00e9t\u00e9"),
    ("京A".encode("gb18030"), [NOT_UTF8], "京A"),
    ("京A ".encode("gb18030"), [NOT_UTF8, "spaces around it"], "京A"),
    (b"two  words", [], "two  words"),
]


@pytest.mark.parametrize(("label", "faults", "right"), CASES)
def test_faults_and_what_mends_them(label, faults, right):
    assert label_faults(label) == (faults[:1] if NOT_UTF8 in faults else faults)
    assert mended(label, "gb18030") == (right, faults)
    assert label_faults(right.encode()) == []


@given(st.binary(max_size=30))
def test_a_mended_label_is_sound(label):
    text, _ = mended(label, "latin-1")
    assert label_faults(text.encode()) == []


@given(st.lists(st.binary(max_size=20), max_size=5))
def test_a_guess_decodes_what_it_was_made_from(samples):
    encoding = guess_encoding(samples)
    b"\n".join(samples).decode(encoding, "strict" if not encoding.startswith("utf") else "replace")


def test_what_cannot_be_decoded_is_an_error():
    with pytest.raises(UnicodeDecodeError):
        mended(b"\xff\xff", "gb18030")
