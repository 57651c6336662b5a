"""What a decoder wrote, character by character."""

from typing import NamedTuple

from torch import Tensor


class Trace(NamedTuple):
    """Words as they were written.

    Attributes:
        ids: `[B, L]` int64, as `greedy` gives them.
        confidence: `[B]` float32, probability of the whole path.
        probabilities: `[B, L]` float32, of each written character; 1 behind the word.
        attention: `[B, L, N]` float32, the share of each of the N frames (or tokens) in a character, rows that sum to
            1, and to 0 behind the word; None where it was not asked for.
    """

    ids: Tensor
    confidence: Tensor
    probabilities: Tensor
    attention: Tensor | None
