"""What the decoders that write one character after the other share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SOS, EOS, PAD = 0, 1, 2
#: longest word in characters
MAX_LENGTH = 25


class AutoregressiveDecoder(nn.Module):
    """Teacher forcing in training, greedy decoding from [SOS] in testing; at most 25 characters and [EOS].

    A subclass offers `start(frames) -> state`, `step(ids, state) -> (logits, state)` for one position of every word,
    and `forward(frames, inputs) -> logits` for all positions of known words.

    Attributes:
        num_special: classes before the first character.
    """

    num_special = 3

    def start(self, frames: Tensor) -> Any:
        """What decoding `frames` `[B, T, C]` needs at every position, computed once."""
        raise NotImplementedError

    def step(self, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The previous characters `[B]` to logits `[B, num_classes]` of the next ones, and the state after them."""
        raise NotImplementedError

    def forward(self, frames: Tensor, inputs: Tensor) -> Tensor:
        """frames `[B, T, C]`, inputs `[B, L]` from [SOS] on, to logits `[B, L, num_classes]`."""
        raise NotImplementedError

    def loss(self, frames: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
        """Cross entropy averaged over all characters and [EOS] of the batch.

        Args:
            frames: `[B, T, C]`.
            targets: `[B, L]` int64, ids 3 and up; see the package.
            lengths: `[B]` int64.
        Returns:
            0-d float32.
        """
        inputs, outputs = teacher(targets, lengths)
        logits = self(frames, inputs).float()
        return F.cross_entropy(logits.flatten(0, 1), outputs.flatten(), ignore_index=PAD)

    @torch.no_grad()
    def greedy(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Write the most probable character until every word has ended ([SOS] and [PAD] are never written).

        Returns:
            ids: `[B, L]` int64, L <= 26: characters, [EOS], then [PAD]; a word of 25 characters may lack [EOS].
            confidence: `[B]` float32, product of the probabilities of what was written.
        """
        state = self.start(frames)
        ids = torch.full((frames.shape[0],), SOS, device=frames.device)
        ended = torch.zeros_like(ids, dtype=torch.bool)
        confidence = torch.ones(len(ids), device=frames.device)
        written = []
        for _ in range(MAX_LENGTH + 1):
            logits, state = self.step(ids, state)
            logits = logits.float()
            logits[:, [SOS, PAD]] = -torch.inf
            probability, ids = logits.softmax(1).max(1)
            ids = ids.masked_fill(ended, PAD)
            confidence = confidence * probability.masked_fill(ended, 1.0)
            written.append(ids)
            ended = ended | (ids == EOS)
            if bool(ended.all()):
                break
        return torch.stack(written, dim=1), confidence


def teacher(targets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs ([SOS], characters) and outputs (characters, [EOS]) `[B, L + 1]` of teacher forcing, then [PAD]."""
    position = torch.arange(targets.shape[1] + 1, device=targets.device)
    length = lengths[:, None]
    inputs = F.pad(targets, (1, 0), value=SOS).masked_fill(position > length, PAD)
    outputs = F.pad(targets, (0, 1), value=PAD).masked_fill(position == length, EOS)
    return inputs, outputs.masked_fill(position > length, PAD)
