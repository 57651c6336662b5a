"""The order of an epoch as a pure function of (seed, epoch, position), in O(1) memory.

A position is shuffled to a slot of the epoch, and a slot names a record. Both steps use a keyed permutation
of [0, n): a Feistel network whose halves are numbers below a and b, a * b >= n, with values from n on sent
through it again until they fall below n (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite
domains", CT-RSA 2002). The round keys are Philox words of (seed, SAMPLER, epoch or pass).
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from rcmstr_fast import random
from rcmstr_fast.config import ConfigError

_ROUNDS = 8
_MAX_EPOCH = (1 << 32) - 1


def permute(values: np.ndarray, n: int, *, seed: int, key: int, epoch: int) -> np.ndarray:
    """A keyed permutation of [0, n).

    Args:
        values: [m] int64 in [0, n).
        n: size of the domain, below 2^48.
        seed: of the run.
        key: which permutation of the epoch, below 2^48.
        epoch: below 2^32.
    Returns:
        [m] int64 in [0, n); distinct for distinct values.
    """
    index = torch.tensor([key])
    words = random.words(index, 2 * _ROUNDS, seed=seed, stream=random.SAMPLER, epoch=epoch)[0].numpy().astype(np.uint64)
    keys = words[0::2] << np.uint64(32) | words[1::2]
    a = max(1, math.isqrt(n - 1) + 1)
    b = (n + a - 1) // a
    result = _feistel(values.astype(np.uint64), a, b, keys)
    while (outside := np.flatnonzero(result >= n)).size:
        result[outside] = _feistel(result[outside], a, b, keys)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of [0, a * b), uint64."""
    high, low = np.divmod(values, np.uint64(b))
    for i in range(0, _ROUNDS, 2):
        high = (high + _mix(low ^ keys[i]) % np.uint64(a)) % np.uint64(a)
        low = (low + _mix(high ^ keys[i + 1]) % np.uint64(b)) % np.uint64(b)
    return high * np.uint64(b) + low


def _mix(x: np.ndarray) -> np.ndarray:
    """64 bits to 64 well-mixed bits (the finaliser of MurmurHash3)."""
    x = (x ^ x >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ x >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ x >> np.uint64(33)


class EpochOrder:
    """Which record each position of each epoch shows.

    The slots of an epoch are dealt to the roots by weight (without weights all records are one pool), and
    each pool is run through in passes that continue from epoch to epoch: after any epoch the numbers of times
    that two records of a pool were shown differ by one at most. Without weights and with as many slots as
    records the slot is the record.

    Attributes:
        epoch_size: slots an epoch.
        shares: slots of each pool.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] = (), epoch_size: int = 0, seed: int = 0) -> None:
        """Check the shares.

        Args:
            sizes: records of each root, in the order of the flat list.
            weights: relative share of each root; empty: by size.
            epoch_size: images an epoch; 0: the number of records.
            seed: of the run.
        Raises:
            ConfigError: weights that do not fit the roots or leave one without a slot, a negative epoch size.
        """
        if weights and (len(weights) != len(sizes) or not all(0 < w < math.inf for w in weights)):
            raise ConfigError(f"data.weights must be {len(sizes)} positive numbers, one a root, got {list(weights)}")
        if epoch_size < 0:
            raise ConfigError(f"data.epoch_size must be 0 or more, got {epoch_size}")
        self.sizes = list(sizes)
        self.seed = seed
        self.epoch_size = epoch_size or sum(sizes)
        self._pools = list(sizes) if weights else [sum(sizes)]
        self.shares = _shares(self.epoch_size, weights or [1])
        if 0 in self.shares:
            raise ConfigError(
                f"data.weights must give each root at least one of the {self.epoch_size} images of an epoch, "
                f"got {list(weights)}"
            )

    def slots(self, epoch: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots and records at the positions start to start + count - 1.

        Args:
            epoch: 0-based, below 2^32.
            start: first position.
            count: positions; start + count is at most `epoch_size`.
        Returns:
            slots [count] int64, unique in the epoch and the `index` of all random streams; records [count] int64.
        Raises:
            ValueError: positions outside of the epoch.
        """
        if not (0 <= epoch <= _MAX_EPOCH and start >= 0 and count >= 0 and start + count <= self.epoch_size):
            raise ValueError(
                f"slots: positions must be in [0, {self.epoch_size}) of an epoch of 0 or more, "
                f"got {start} to {start + count - 1} of epoch {epoch}"
            )
        positions = np.arange(start, start + count)
        slots = permute(positions, self.epoch_size, seed=self.seed, key=0, epoch=epoch)
        return slots, self._records(epoch, slots)

    def replacements(self, epoch: int, slots: np.ndarray, tries: int) -> np.ndarray:
        """Records to try, one after the other, where the record of a slot is broken.

        Args:
            epoch: of the slots.
            slots: [n] int64.
            tries: candidates a slot.
        Returns:
            [n, tries] int64 records of the slot's pool, a pure function of (seed, epoch, slot, try).
        """
        words = random.words(
            torch.from_numpy(slots), 2 * tries, seed=self.seed, stream=random.REPLACEMENT, epoch=epoch
        ).numpy()
        drawn = words[:, 0::2] << 31 | words[:, 1::2] >> 1
        pool = np.searchsorted(np.cumsum(self.shares), slots, side="right")
        first = np.cumsum([0, *self._pools])[pool]
        return first[:, None] + drawn % np.asarray(self._pools)[pool, None]

    def _records(self, epoch: int, slots: np.ndarray) -> np.ndarray:
        records = np.empty_like(slots)
        first_slot = first_record = 0
        for pool, (size, share) in enumerate(zip(self._pools, self.shares)):
            mine = np.flatnonzero((first_slot <= slots) & (slots < first_slot + share))
            if mine.size:
                shown = epoch * share + (slots[mine] - first_slot)  # counted over all epochs
                records[mine] = first_record + self._in_pool(pool, shown, size, share)
            first_slot += share
            first_record += size
        return records

    def _in_pool(self, pool: int, shown: np.ndarray, size: int, share: int) -> np.ndarray:
        passes, inside = np.divmod(shown, size)
        if share % size == 0:  # every pass lies inside one epoch, whose slots are shuffled already
            return inside
        for number in np.unique(passes):
            mine = passes == number
            inside[mine] = permute(inside[mine], size, seed=self.seed, key=1 + pool, epoch=int(number) & _MAX_EPOCH)
        return inside


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Deal `total` slots by weight: whole parts first, the rest to the largest remainders, exactly."""
    exact = [Fraction(weight) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    shares = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: shares[i] - quotas[i])
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares
