from itertools import pairwise

import numpy as np
import pytest

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.labelled import LabelledSet
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.data.source import open_sources


def source(folder, labels):
    write_lmdb(folder, [(b"picture %d" % i, label) for i, label in enumerate(labels)])
    return open_sources([str(folder)])


@pytest.fixture
def words(tmp_path):
    return source(
        tmp_path / "set", ["Cat", None, "dog!", "", "x" * 26, "na\u00efve", "[Unlabeled_data]", "---", "Bird"]
    )


def test_reasons_are_counted(words):
    kept = LabelledSet(words, Charset.load("36"), normalise=lambda s: s.lower().strip("!-"))
    assert kept.labels == ["cat", "dog", "bird"]
    assert kept.records.tolist() == [0, 2, 8] and kept.records.dtype == np.int64
    assert kept.dropped == {
        "unlabelled": 3,
        "longer than 25 characters": 1,
        "outside the charset": 1,
        "empty after normalisation": 1,
    }
    assert len(kept) + sum(kept.dropped.values()) == kept.total == len(words)
    assert kept.describe().startswith("3 of 9 records kept (3 unlabelled")


def test_a_charset_of_capitals_under_a_protocol_of_small_letters(tmp_path):
    (tmp_path / "capitals.txt").write_text("ABC")
    capitals, small = Charset.load(str(tmp_path / "capitals.txt")), Charset.load("36")
    plates = source(tmp_path / "set", ["AB", "C", "A1"])
    with pytest.raises(
        ConfigError, match=r"'a' of 2 labels, .* which it has as capitals: a charset must be written as"
    ):
        LabelledSet(plates, capitals, normalise=str.lower)
    assert "capitals" not in LabelledSet(plates, capitals).describe()
    assert "capitals" not in LabelledSet(plates, small, normalise=lambda s: s.lower().replace("1", "!")).describe()


def test_without_normalisation_labels_stay(words):
    assert LabelledSet(words, Charset.load("94")).labels == ["Cat", "dog!", "---", "Bird"]
    assert "x" * 26 in LabelledSet(words, Charset.load("94"), max_length=26).labels


def test_unknown_characters_as_an_error_name_the_record(words):
    with pytest.raises(ConfigError, match=r"image-000000001: expected .* got 'C' in 'Cat'"):
        LabelledSet(words, Charset.load("36"), unknown="error")


def test_nothing_kept(words):
    with pytest.raises(ConfigError, match="none can be used: 0 of 9"):
        LabelledSet(words, Charset(["Z"]))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    labels = [None if i % 7 == 0 else f"w{i}" for i in range(1400)]
    return LabelledSet(source(tmp_path_factory.mktemp("many") / "set", labels), Charset.load("36"))


def test_subsets_are_seeded_nested_and_sized(many):
    shares = [0.01, 0.05, 0.1, 1.0]
    subsets = [many.subset(share, seed=3) for share in shares]
    assert [len(s) for s in subsets] == [round(share * len(many)) for share in shares]
    for small, large in pairwise(subsets):
        assert set(small.records) <= set(large.records)
    assert subsets[-1].labels == many.labels
    again, other = many.subset(0.1, seed=3), many.subset(0.1, seed=4)
    assert np.array_equal(again.records, subsets[2].records)
    assert not np.array_equal(other.records, again.records)
    assert again.labels == [f"w{record}" for record in again.records]
    assert again.dropped["not in the subset"] == len(many) - len(again)
    assert len(again) + sum(again.dropped.values()) == many.total


def test_subsets_are_spread_over_the_set(many):
    records = many.subset(0.25, seed=0).records
    quarters = np.bincount(records * 4 // 1400, minlength=4)
    assert quarters.min() > 0.15 * len(records)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_wrong_share(many, share):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
        many.subset(share, seed=0)
