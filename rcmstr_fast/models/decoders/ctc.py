"""Connectionist temporal classification: one class a frame."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.models.decoders.autoregressive import MAX_LENGTH
from rcmstr_fast.models.decoders.trace import Trace
from rcmstr_fast.models.recurrent import bilstm_stack
from rcmstr_fast.ops.precision import full_precision

#: class of "no character"
BLANK = 0


def frames_needed(text: Sequence[object]) -> int:
    """Frames that a path of a text has at least: one a character, and a blank between two equal ones."""
    return len(text) + sum(a == b for a, b in pairwise(text))


class CTCDecoder(nn.Module):
    """Two bidirectional LSTM layers and a linear classifier of each frame (class 0 is the blank).

    Attributes:
        num_special: classes before the first character.
        default_memory: what of an encoder it reads.
        max_length: longest word it is trained on, in characters; what it writes is limited by the frames alone.
    """

    num_special = 1
    default_memory = "frames"

    def __init__(self, in_channels: int, num_classes: int, hidden: int = 256, *, max_length: int = MAX_LENGTH) -> None:
        """Make a decoder; `num_classes` counts the blank, `hidden` is LSTM units a direction."""
        super().__init__()
        self.max_length = max_length
        self.context: nn.Module = bilstm_stack(in_channels, hidden)
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, frames: Tensor) -> Tensor:
        """frames `[B, T, C]` to logits `[B, T, num_classes]`."""
        return self.classifier(self.context(frames))

    def loss(self, frames: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        """CTC loss a character, averaged over words; words that T frames cannot spell count as zero.

        Args:
            frames: `[B, T, C]`.
            targets: `[B, L]` int64, ids 1 and up; see the package.
            lengths: `[B]` int64.
        Returns:
            0-d float32.
        """
        log_probs = F.log_softmax(full_precision(self(frames)), dim=2).transpose(0, 1)
        steps = torch.full_like(lengths, frames.shape[1])
        return F.ctc_loss(log_probs, targets.clamp_min(0), steps, lengths, blank=BLANK, zero_infinity=True)

    def terms(self, lengths: Sequence[int]) -> int:
        """How many terms `loss` is the mean of, for words of these lengths: the words."""
        return len(lengths)

    @torch.no_grad()
    def greedy(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Best class of each frame, repeats merged, blanks dropped.

        Returns:
            ids: `[B, T]` int64, characters first, filled up with 0.
            confidence: `[B]` float32, probability of the best path.
        """
        probability, best = full_precision(self(frames)).softmax(2).max(2)
        first = best.masked_fill(best == _before(best), BLANK)
        to_front = torch.argsort((first == BLANK).byte(), dim=1, stable=True)
        return first.gather(1, to_front), probability.prod(1)

    @torch.no_grad()
    def trace(self, frames: Tensor) -> Trace:
        """What `greedy` writes; a character's attention is spread evenly over the frames of its run.

        Its probability is the highest of those frames.
        """
        probability, best = full_precision(self(frames)).softmax(2).max(2)
        starts = (best != BLANK) & (best != _before(best))
        place = starts.cumsum(1) - 1  # of the run's character in the word
        runs = F.one_hot(place.clamp_min(0), best.shape[1]).transpose(1, 2) * (best != BLANK)[:, None]
        ids = (runs * best[:, None]).amax(2)
        each = (runs * probability[:, None]).amax(2).masked_fill(ids == BLANK, 1.0)
        attention = runs / runs.sum(2, keepdim=True).clamp_min(1)
        return Trace(ids, probability.prod(1), each, attention)


class LinearCTCDecoder(CTCDecoder):
    """SeqCLR's CTC decoder: one linear layer, nothing else."""

    def __init__(self, in_channels: int, num_classes: int, *, max_length: int = MAX_LENGTH) -> None:
        """Make a decoder; `num_classes` counts the blank."""
        nn.Module.__init__(self)
        self.max_length = max_length
        self.context = nn.Identity()
        self.classifier = nn.Linear(in_channels, num_classes)


def _before(best: Tensor) -> Tensor:
    """The class of the frame before, blank before the first."""
    return F.pad(best[:, :-1], (1, 0), value=BLANK)
