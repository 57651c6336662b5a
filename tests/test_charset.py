import pickle
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError


def write(tmp_path, data: bytes) -> str:
    path = tmp_path / "charset.txt"
    path.write_bytes(data)
    return str(path)


def test_named_charsets_have_the_order_of_the_field():
    full = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" + string.punctuation
    for name in ("36", "62", "94"):
        assert "".join(Charset.load(name).characters) == full[: int(name)]


@given(st.lists(st.characters(exclude_categories=("Cs",)), min_size=1, unique=True), st.data())
def test_encode_and_decode_are_inverse(characters, data):
    charset = Charset(characters)
    text = "".join(data.draw(st.lists(st.sampled_from(characters), max_size=30)))
    first = data.draw(st.sampled_from([0, 1, 3]))
    ids = charset.encode(text, first)
    assert charset.decode(ids, first) == text
    assert all(first <= i < first + len(charset) for i in ids)
    assert Charset(charset.to_list()) == charset


@pytest.mark.parametrize(
    "data",
    [
        b"a\nb\n \n\xe4\xb8\xad\n",
        b"ab \xe4\xb8\xad",
        b"\xef\xbb\xbfa\r\nb\r\n \r\n\xe4\xb8\xad\r\n",
        b"ab \xe4\xb8\xad\r\n",
    ],
)
def test_file_forms(tmp_path, data):
    assert Charset.load(write(tmp_path, data)).characters == ("a", "b", " ", "中")


def test_unusual_line_separators_are_characters(tmp_path):
    assert Charset.load(write(tmp_path, "a\n\u2028\n\x85\n".encode())).characters == ("a", "\u2028", "\x85")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nbc\nd\n", "line 2: expected one character"),
        (b"aba", "'a' comes twice"),
        (b"", "at least one character"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_wrong_files_are_named(tmp_path, data, message):
    with pytest.raises(ConfigError, match=message):
        Charset.load(write(tmp_path, data))


def test_unknown_name():
    with pytest.raises(ConfigError, match="36, 62, 94 or a file, got '95'"):
        Charset.load("95")


def test_errors_name_what_is_outside():
    charset = Charset.load("36")
    assert charset.missing("aAbBA") == "AB"
    with pytest.raises(ValueError, match="got 'AB' in 'aAbB'"):
        charset.encode("aAbB")
    with pytest.raises(ValueError, match=r"ids in 3\.\.38, got 2"):
        charset.decode([5, 2], first=3)
    with pytest.raises(ValueError, match="single characters, got 'ab'"):
        Charset(["ab"])


def test_nothing_is_folded_and_it_pickles():
    charset = Charset(["é", "ｅ", "e", "ß"])
    assert charset.encode("éｅeß") == [0, 1, 2, 3]
    assert charset.missing("e\u0301") == "\u0301"
    copy = pickle.loads(pickle.dumps(charset))
    assert copy == charset and hash(copy) == hash(charset) and "é" in copy and len(copy) == 4
