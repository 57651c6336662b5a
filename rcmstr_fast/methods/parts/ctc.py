"""Connectionist temporal classification in tensor operations alone (Graves et al., ICML 2006).

Torch's own asks the host for the lengths, which a recorded step cannot.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rcmstr_fast.ops.precision import full_precision

#: Logarithm of no probability; finite, so that no difference of two is NaN.
_NEVER = -1e30


def spellable(targets: Tensor, lengths: Tensor, frames: int) -> Tensor:
    """Whether some path of `frames` classes spells a word: one a character, a blank between two equal ones.

    Args:
        targets: [B, L] int64; what stands behind the word is ignored.
        lengths: [B] int64.
        frames: T.
    Returns:
        [B] bool; False for words without characters.
    """
    place = torch.arange(1, targets.shape[1], device=targets.device)
    doubled = (targets[:, 1:] == targets[:, :-1]) & (place < lengths[:, None])
    return (lengths > 0) & (lengths + doubled.sum(1) <= frames)


def ctc_losses(logits: Tensor, targets: Tensor, lengths: Tensor, blank: int = 0) -> Tensor:
    """-log of the probability of all paths that spell a word, divided by its characters.

    Args:
        logits: [B, T, K] of each frame. Receives a gradient.
        targets: [B, L] int64 in [0, K) for the word's characters; what stands behind is ignored.
        lengths: [B] int64.
        blank: class of no character.
    Returns:
        [B] float32 (float64 for float64 logits); 0 where a word has no characters or no path spells it.
    """
    log_probs = F.log_softmax(full_precision(logits), dim=2)
    place = torch.arange(targets.shape[1], device=targets.device)
    known = targets.where(place < lengths[:, None], blank)
    states = torch.stack([torch.full_like(known, blank), known], dim=2).flatten(1)
    states = F.pad(states, (0, 1), value=blank)  # blank, first, blank, second, .., blank: [B, 2 L + 1]
    may_skip = (states != blank) & (states != F.pad(states[:, :-2], (2, 0), value=blank))
    emitted = log_probs.gather(2, states[:, None].expand(-1, log_probs.shape[1], -1))
    start = torch.arange(states.shape[1], device=states.device) < 2
    reached = emitted[:, 0].where(start, _NEVER)
    for row in emitted.unbind(1)[1:]:
        before = F.pad(reached[:, :-1], (1, 0), value=_NEVER)
        over = F.pad(reached[:, :-2], (2, 0), value=_NEVER).where(may_skip, _NEVER)
        reached = torch.logsumexp(torch.stack([reached, before, over]), dim=0) + row
    ends = torch.stack([2 * lengths, (2 * lengths - 1).clamp(min=0)], dim=1)
    loss = -torch.logsumexp(reached.gather(1, ends), dim=1) / lengths.clamp(min=1)
    return loss.where(spellable(targets, lengths, logits.shape[1]), 0.0)
