"""Connectionist temporal classification: one class a frame."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.models.recurrent import bilstm_stack

#: class of "no character"
BLANK = 0


class CTCDecoder(nn.Module):
    """Two bidirectional LSTM layers and a linear classifier of each frame (class 0 is the blank).

    Attributes:
        num_special: classes before the first character.
    """

    num_special = 1

    def __init__(self, in_channels: int, num_classes: int, hidden: int = 256) -> None:
        """Make a decoder; `num_classes` counts the blank, `hidden` is LSTM units a direction."""
        super().__init__()
        self.context = bilstm_stack(in_channels, hidden)
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, frames: Tensor) -> Tensor:
        """frames `[B, T, C]` to logits `[B, T, num_classes]`."""
        return self.classifier(self.context(frames))

    def loss(self, frames: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        """CTC loss a character, averaged over words; words that do not fit into T frames count as zero.

        Args:
            frames: `[B, T, C]`.
            targets: `[B, L]` int64, ids 1 and up; see the package.
            lengths: `[B]` int64.
        Returns:
            0-d float32.
        """
        log_probs = F.log_softmax(self(frames).float(), dim=2).transpose(0, 1)
        steps = torch.full_like(lengths, frames.shape[1])
        return F.ctc_loss(log_probs, targets.clamp_min(0), steps, lengths, blank=BLANK, zero_infinity=True)

    @torch.no_grad()
    def greedy(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Best class of each frame, repeats merged, blanks dropped.

        Returns:
            ids: `[B, T]` int64, characters first, filled up with 0.
            confidence: `[B]` float32, probability of the best path.
        """
        probability, best = self(frames).float().softmax(2).max(2)
        before = F.pad(best[:, :-1], (1, 0), value=BLANK)
        best = best.masked_fill(best == before, BLANK)
        to_front = torch.argsort((best == BLANK).byte(), dim=1, stable=True)
        return best.gather(1, to_front), probability.prod(1)
