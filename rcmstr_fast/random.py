"""Counter-based random numbers: every choice is a pure function of (seed, stream, epoch, index).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch integer
arithmetic. The counter is (draw / 4, index low 32 bits, index high 16 bits | stream << 16, epoch) and the
key is the seed; `csrc/philox.h` computes the same words.
"""

import torch
from torch import Tensor

#: Streams: independent sequences for one (seed, epoch, index). Augmentation takes AUGMENT + view.
SAMPLER, PERMUTATION, MASK, BN_GROUPS, SUBSET, ENQUEUE, REPLACEMENT, AUGMENT = 1, 2, 3, 4, 5, 6, 7, 256
#: Streams of single methods; the first two have one more for a second level.
CONTEXT, GUMBEL, CROPS, PATHS = 32, 36, 38, 39

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mul(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit words held in int64 (the product wraps, its bits are right)."""
    product = b * a
    return (product >> 32) & _LOW, product & _LOW


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of four 32-bit counter words (int64 tensors of one shape) under a 64-bit seed."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        hi0, lo0 = _mul(_MULTIPLIERS[0], c0)
        hi1, lo1 = _mul(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def words(index: Tensor, count: int, *, seed: int, stream: int, epoch: int | Tensor) -> Tensor:
    """Random 32-bit words.

    Args:
        index: [B] int64 below 2^48; the sample.
        count: words a sample.
        seed: 64-bit key.
        stream: below 65,536; one of the streams above.
        epoch: below 2^32; a 0-d int64 tensor on the device of `index` where the choice must follow it on the device.
    Returns:
        [B, count] int64, each in [0, 2^32).
    """
    draws = torch.arange((count + 3) // 4, device=index.device)
    c0 = draws.expand(index.numel(), -1)
    c1 = (index & _LOW)[:, None].expand_as(c0)
    c2 = (((index >> 32) & 0xFFFF) | (stream << 16))[:, None].expand_as(c0)
    c3 = epoch.expand_as(c0) if isinstance(epoch, Tensor) else torch.full_like(c0, epoch)
    out = philox(seed, (c0, c1, c2, c3))
    return torch.stack(out, dim=2).flatten(1)[:, :count]


def uniform(words: Tensor) -> Tensor:
    """Words to float32 in [0, 1), multiples of 2^-24 (exact, the same in C++)."""
    return (words >> 8).to(torch.float32) * 2.0**-24


def normal(words: Tensor) -> Tensor:
    """Pairs of words [.., 2n] to standard normals [.., n] float32 (Box-Muller in float64)."""
    u = ((words >> 8).to(torch.float64) + 0.5) * 2.0**-24
    radius = torch.sqrt(-2.0 * torch.log(u[..., 0::2]))
    return (radius * torch.cos(2.0 * torch.pi * u[..., 1::2])).to(torch.float32)


def integers(words: Tensor, bound: int | Tensor) -> Tensor:
    """Words to int64 in [0, bound), bound below 2^31 (multiply-shift)."""
    return (words * bound) >> 32


def permutation(words: Tensor) -> Tensor:
    """Rows of words [.., n] to permutations [.., n] int64 (stable sort by word)."""
    return torch.argsort(words, dim=-1, stable=True)
