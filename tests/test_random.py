"""Philox4x32-10 against published vectors, and the distributions drawn from it."""

import pytest
import torch
from scipy import stats

from rcmstr_fast import random

ALL_ONES = 0xFFFFFFFF
VECTORS = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((1 << 64) - 1, (ALL_ONES,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("seed", "counter", "expected"), VECTORS, ids=["zeros", "ones", "pi"])
def test_known_answers(seed, counter, expected):
    words = random.philox(seed, tuple(torch.tensor([c]) for c in counter))
    assert tuple(w.item() for w in words) == expected


def draw(index=1, count=8, seed=7, stream=random.MASK, epoch=0):
    return random.words(torch.as_tensor(index).view(-1), count, seed=seed, stream=stream, epoch=epoch)


def test_counter_layout():
    """Words 4 j .. 4 j + 3 are one Philox call at (j, index low, index high | stream << 16, epoch)."""
    index, seed, epoch = (5 << 32) | 9, 0x1234567890ABCDEF, 11
    got = draw(index, 7, seed, random.AUGMENT + 1, epoch)[0]
    calls = []
    for j in range(2):
        counter = (j, 9, 5 | (257 << 16), epoch)
        calls += random.philox(seed, tuple(torch.tensor([c]) for c in counter))
    assert torch.equal(got, torch.cat(calls)[:7])
    assert torch.equal(draw(index, 3, seed, random.AUGMENT + 1, epoch)[0], got[:3]), "a prefix of longer draws"


def test_every_part_of_the_key_matters():
    base = draw()
    other = [draw(index=2), draw(index=1 + (1 << 32)), draw(seed=8), draw(seed=7 + (1 << 32)), draw(epoch=1)]
    other += [draw(stream=s) for s in (random.SAMPLER, random.PERMUTATION, random.AUGMENT)]
    assert all((base != words).all() for words in other)
    batch = draw(torch.arange(50))
    assert torch.equal(batch[[4, 30]], draw([4, 30])), "a row depends on its index only"
    assert draw(torch.arange(0)).shape == (0, 8) and draw(count=0).shape == (1, 0)


def test_uniform():
    values = random.uniform(draw(torch.arange(1000), 100)).flatten()
    assert values.dtype == torch.float32 and values.min() >= 0 and values.max() < 1
    assert random.uniform(torch.tensor([ALL_ONES, 0])).tolist() == [1 - 2.0**-24, 0.0]
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3


def test_normal():
    values = random.normal(draw(torch.arange(1000), 200)).flatten()
    assert values.shape == (100_000,) and values.dtype == torch.float32
    assert random.normal(torch.tensor([[0, 0], [ALL_ONES, ALL_ONES]])).isfinite().all()
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    assert abs(values.mean()) < 4 / 100_000**0.5 and abs(values.var() - 1) < 4 * (2 / 100_000) ** 0.5


@pytest.mark.parametrize(
    "other",
    [{"stream": random.PERMUTATION}, {"epoch": 1}, {"seed": 8}, {"index": torch.arange(1000, 2000)}],
    ids=lambda changes: next(iter(changes)),
)
def test_streams_are_uncorrelated(other):
    a, b = (random.uniform(draw(**({"index": torch.arange(1000), "count": 100} | c))).double() for c in ({}, other))
    for left, right in ((a, b), (a[:, :-1], b[:, 1:]), (a[:-1], b[1:])):
        correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
        assert abs(correlation) < 4 / left.numel() ** 0.5


def test_integers():
    words = draw(torch.arange(1000), 30)
    values = random.integers(words, 29)
    counts = torch.bincount(values.flatten(), minlength=29)
    assert values.min() >= 0 and len(counts) == 29
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert random.integers(torch.tensor([0, ALL_ONES]), 5).tolist() == [0, 4]
    bounds = torch.tensor([1, 2, 1000])
    assert (random.integers(words[:, :3], bounds) < bounds).all()


def test_permutation():
    rows = random.permutation(draw(torch.arange(6000), 4))
    assert torch.equal(rows.sort(dim=1).values, torch.arange(4).expand(6000, 4))
    counts = (rows @ torch.tensor([64, 16, 4, 1])).unique(return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert random.permutation(torch.tensor([3, 1, 3, 0])).tolist() == [3, 1, 0, 2], "equal words keep their order"
