"""Which words a decoder is trained on, their pictures and their frames."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.labelled import LabelledSet
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.evaluation.decoder_data import WordImages, ahead, open_words, split_words, training_words
from rcmstr_fast.evaluation.protocols import get_protocol
from tests.evaluation.rendered import picture, write_words

CHARSET = Charset.load("36")


class Numbered:
    """A source whose labels are its record numbers."""

    def __init__(self, count):
        self.sizes = [count]

    def __len__(self):
        return self.sizes[0]

    def labels(self, indices):
        return [str(i) for i in indices]


def numbered(count):
    return LabelledSet(Numbered(count), CHARSET)


@pytest.mark.parametrize("subset, size", [(0.01, 2), (0.05, 9), (0.1, 18), (1.0, 180)])
def test_split_has_the_asked_sizes(subset, size):
    train, val = split_words(numbered(200), 0.1, subset, 7)
    assert len(val) == 20 and len(train) == size
    assert not set(train.labels) & set(val.labels)
    assert train.labels == [str(i) for i in train.records] and (np.diff(train.records) > 0).all()


def test_split_depends_on_the_seed_and_smaller_subsets_lie_within_larger_ones():
    found = numbered(500)
    small, val = split_words(found, 0.1, 0.05, 3)
    large, same_val = split_words(found, 0.1, 0.1, 3)
    assert set(small.labels) < set(large.labels) and val.labels == same_val.labels
    assert split_words(found, 0.1, 0.05, 4)[0].labels != small.labels
    assert len(split_words(found, 0.0, 1.0, 3)[0]) == 500


def test_split_leaves_training_words_or_says_so():
    train, val = split_words(numbered(2), 0.1, 1.0, 0)
    assert (len(train), len(val)) == (1, 1)
    with pytest.raises(ConfigError, match="1 usable words are too few"):
        split_words(numbered(1), 0.1, 1.0, 0)


def test_targets_are_normalised_and_others_counted(tmp_path, caplog):
    root = write_words(tmp_path / "a", ["It's", "!!", "x" * 26, "café", "A1", None])
    found = training_words([root], get_protocol("fewer_labels36"), CHARSET)
    assert found.labels == ["its", "caf", "a1"]
    assert found.records.tolist() == [0, 3, 4]
    assert sum(found.dropped.values()) == 3
    assert "3 of 6 records kept" in caplog.text and "longer than 25" in caplog.text


def test_labels_outside_the_charset(tmp_path):
    root = write_words(tmp_path / "a", ["a-b", "c-d", "ok"])
    found = training_words([root], get_protocol("exact"), CHARSET)
    assert found.labels == ["ok"] and found.dropped == {"outside the charset": 2}
    with pytest.raises(ConfigError, match=r"train: .*0 of 3 records kept"):
        training_words([root], get_protocol("exact"), Charset("z"))


def test_no_labels(tmp_path):
    with pytest.raises(ConfigError, match=r"test x must hold labelled words, got .* 2 unlabelled"):
        open_words([write_words(tmp_path / "a", [None, None])], "test x")


@pytest.mark.parametrize("limit_gib", [0.0, 1.0])
def test_pictures_and_broken_ones(tmp_path, limit_gib):
    write_lmdb(tmp_path / "a", [(picture("1"), "1"), (b"no picture", "2"), (picture("3"), "3")])
    words = open_words([str(tmp_path / "a")], "train")
    with ThreadPoolExecutor(1) as pool:
        images = WordImages(words, (32, 32), pool, limit_gib)
        got = images.get(np.array([2, 1, 0, 2]))
        again = images.get(np.array([0, 2]))
    assert got.shape == (4, 32, 32, 3) and got.dtype == np.uint8
    assert (got[0] == got[3]).all() and (got[0] != got[2]).any()
    assert (again == got[[2, 0]]).all()
    assert (got[1] == 0).all() and list(images.broken) == [1]
    assert images.words.name(1).endswith("image-000000002")


def test_ahead_keeps_order_and_passes_errors():
    keys = [np.array([i]) for i in range(5)]
    assert [(int(k[0]), made) for k, made in ahead(lambda k: int(k[0]) ** 2, keys)] == [(i, i * i) for i in range(5)]
    assert list(ahead(len, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda k: 1 // int(k[0]), keys))
