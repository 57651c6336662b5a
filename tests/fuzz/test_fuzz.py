"""The short form of `make fuzz`: a few attempts of every kind; the long one is in tests/fuzz/run.py."""

import pytest

from tests.fuzz.run import attack, kinds

SHORT = {"lmdb": 60, "labels.tsv": 60, "checkpoint": 24, "encoder": 16, "recogniser": 16, "yaml": 24}


@pytest.mark.parametrize("kind", kinds())
def test_damaged_files_are_taken_or_refused(kind, tmp_path):
    ends, failures = attack(kind, tmp_path, range(SHORT.get(kind, 100)))
    assert not failures, "\n".join(failures)
    if kind == "labels.tsv":  # damaged lines are counted; none is a reason to refuse the list
        assert ends["taken"] == SHORT[kind]
    else:
        assert ends["refused"] > 0
