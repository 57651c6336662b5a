"""What the decoders that write one character after the other share."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.models.decoders.trace import Trace
from rcmstr_fast.ops.precision import full_precision

SOS, EOS, PAD = 0, 1, 2
#: longest word in characters, unless a decoder is made for another
MAX_LENGTH = 25


class AutoregressiveDecoder(nn.Module):
    """Teacher forcing in training, greedy decoding from [SOS] in testing; at most `max_length` characters.

    A subclass offers `start(frames) -> state`, `step(ids, state) -> (logits, state)` for one position of every word,
    where `state.attention` `[B, N]` is where that step looked, and `forward(frames, inputs) -> logits` for all
    positions of known words.

    Attributes:
        num_special: classes before the first character.
        default_memory: what of an encoder it reads unless told otherwise: `frames` or `tokens`.
        max_length: longest word it writes, in characters.
    """

    num_special = 3
    default_memory = "frames"

    def __init__(self, max_length: int = MAX_LENGTH) -> None:
        """Set the longest word."""
        super().__init__()
        self.max_length = max_length

    def start(self, frames: Tensor, *, attention: bool = False) -> Any:
        """What decoding needs at every position, computed once.

        Args:
            frames: `[B, N, C]`.
            attention: the steps shall also say where they looked.
        """
        raise NotImplementedError

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The previous characters `[B]` to logits `[B, num_classes]` of the next ones, and the state after them."""
        raise NotImplementedError

    def forward(self, frames: Tensor, inputs: Tensor) -> Tensor:
        """frames `[B, N, C]`, inputs `[B, L]` from [SOS] on, to logits `[B, L, num_classes]`."""
        raise NotImplementedError

    def loss(self, frames: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        """Cross entropy averaged over all characters and [EOS] of the batch.

        Args:
            frames: `[B, N, C]`.
            targets: `[B, L]` int64, ids 3 and up; see the package.
            lengths: `[B]` int64.
        Returns:
            0-d float32.
        """
        inputs, outputs = teacher(targets, lengths)
        logits = full_precision(self(frames, inputs))
        return F.cross_entropy(logits.flatten(0, 1), outputs.flatten(), ignore_index=PAD)

    def terms(self, lengths: Sequence[int]) -> int:
        """How many terms `loss` is the mean of, for words of these lengths: their characters and an [EOS] each."""
        return sum(lengths) + len(lengths)

    def greedy(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Write the most probable character until every word has ended ([SOS] and [PAD] are never written).

        Returns:
            ids: `[B, L]` int64, L <= max_length: characters, [EOS], then [PAD]; a word of L characters lacks [EOS].
            confidence: `[B]` float32, product of the probabilities of what was written.
        """
        found = self._write(frames, attention=False)
        return found.ids, found.confidence

    def trace(self, frames: Tensor) -> Trace:
        """What `greedy` writes, with the probability of each character and where the decoder looked for it."""
        return self._write(frames, attention=True)

    @torch.no_grad()
    def _write(self, frames: Tensor, *, attention: bool) -> Trace:
        state = self.start(frames, attention=attention)
        ids = torch.full((frames.shape[0],), SOS, device=frames.device)
        ended = torch.zeros_like(ids, dtype=torch.bool)
        written, probabilities, looked = [], [], []
        for _ in range(self.max_length):
            logits, state = self.step(ids, state)
            logits = full_precision(logits)
            logits[:, [SOS, PAD]] = -torch.inf
            probability, ids = logits.softmax(1).max(1)
            ids = ids.masked_fill(ended, PAD)
            written.append(ids)
            probabilities.append(probability.masked_fill(ended, 1.0))
            if attention:
                looked.append(full_precision(state.attention).masked_fill(ended[:, None], 0.0))
            ended = ended | (ids == EOS)
            if bool(ended.all()):
                break
        each = torch.stack(probabilities, dim=1)
        return Trace(torch.stack(written, dim=1), each.prod(1), each, torch.stack(looked, dim=1) if attention else None)


def teacher(targets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs ([SOS], characters) and outputs (characters, [EOS]) `[B, L + 1]` of teacher forcing, then [PAD]."""
    position = torch.arange(targets.shape[1] + 1, device=targets.device)
    length = lengths[:, None]
    inputs = F.pad(targets, (1, 0), value=SOS).masked_fill(position > length, PAD)
    outputs = F.pad(targets, (0, 1), value=PAD).masked_fill(position == length, EOS)
    return inputs, outputs.masked_fill(position > length, PAD)
