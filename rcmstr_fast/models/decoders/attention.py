"""Attention decoders: an LSTM cell that looks at the frames with additive attention at every character."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.models.decoders.autoregressive import MAX_LENGTH, AutoregressiveDecoder
from rcmstr_fast.models.recurrent import BidirectionalLSTM


class AttentionState(NamedTuple):
    """Between two characters.

    Attributes:
        memory: `[B, N, M]`, what is looked at.
        keys: `[B, N, hidden]`, its part in the scores.
        hidden: `[B, hidden]` of the cell.
        cell: `[B, hidden]` of the cell.
        attention: `[B, N]`, where the last step looked.
    """

    memory: Tensor
    keys: Tensor
    hidden: Tensor
    cell: Tensor
    attention: Tensor


class AttentionDecoder(AutoregressiveDecoder):
    """SeqCLR's decoder (its Eq. 4 to 8), over the frames as they are.

    For a state s of the cell, frames f_t and the previous character y:
    e_t = a^T tanh(W s + V f_t + b); alpha = softmax(e); g = sum_t alpha_t f_t; s' = LSTM(s, [g, one-hot(y)]);
    logits = W_0 s' + b_0. Eq. 5 prints e_t for exp(e_t) in the divisor, which is read as the softmax it means.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        hidden: int = 256,
        *,
        max_length: int = MAX_LENGTH,
        memory_channels: int = 0,
        query_bias: bool = False,
    ) -> None:
        """Make a decoder.

        Args:
            in_channels: of the frames.
            num_classes: counts the three special classes.
            hidden: units of the cell, and width of the attention.
            max_length: longest word in characters.
            memory_channels: of what `remember` makes of the frames; 0: in_channels.
            query_bias: a bias of W s beside that of V f, as the public TRBA code has it.
        """
        super().__init__(max_length)
        memory = memory_channels or in_channels
        self.num_classes = num_classes
        self.key = nn.Linear(memory, hidden)
        self.query = nn.Linear(hidden, hidden, bias=query_bias)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.cell = nn.LSTMCell(memory + num_classes, hidden)
        self.classifier = nn.Linear(hidden, num_classes)

    def remember(self, frames: Tensor) -> Tensor:
        """Frames `[B, N, C]` to what is looked at, `[B, N, M]`."""
        return frames

    def start(self, frames: Tensor, *, attention: bool = False) -> AttentionState:
        """The memory, its keys, and a zero cell; where it looks is known at every step anyway."""
        memory = self.remember(frames)
        keys = self.key(memory)
        memory = memory.to(keys.dtype)
        zero = keys.new_zeros(len(keys), self.cell.hidden_size)
        return AttentionState(memory, keys, zero, zero, keys.new_zeros(keys.shape[:2]))

    def step(self, ids: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """Logits of the next character, see the base class."""
        state = self._advance(ids, state)
        return self.classifier(state.hidden), state

    def forward(self, frames: Tensor, inputs: Tensor) -> Tensor:
        """Logits of all positions, see the base class."""
        state = self.start(frames)
        hidden = []
        for ids in inputs.unbind(1):
            state = self._advance(ids, state)
            hidden.append(state.hidden)
        return self.classifier(torch.stack(hidden, dim=1))

    def _advance(self, ids: Tensor, state: AttentionState) -> AttentionState:
        score = self.score(torch.tanh(state.keys + self.query(state.hidden)[:, None]))
        attention = score[..., 0].softmax(1)
        glimpse = (attention[:, None].to(state.memory.dtype) @ state.memory)[:, 0]
        entry = torch.cat([glimpse, F.one_hot(ids, self.num_classes).to(glimpse.dtype)], dim=1)
        hidden, cell = self.cell(entry, (state.hidden, state.cell))
        return state._replace(hidden=hidden, cell=cell, attention=attention)


class SelectiveAttentionDecoder(AttentionDecoder):
    """The decoder of the released RCLSTR code (5.84 M parameters over 512 channels with 97 classes).

    Two bidirectional LSTM layers give contextual frames of as many channels as the visual ones; both side by side, D,
    go through the gate D * (W D + b), and are what the attention looks at. Its queries have a bias of their own.
    """

    def __init__(self, in_channels: int, num_classes: int, hidden: int = 256, *, max_length: int = MAX_LENGTH) -> None:
        """Make a decoder; see `AttentionDecoder`."""
        memory = 2 * in_channels
        super().__init__(
            in_channels, num_classes, hidden, max_length=max_length, memory_channels=memory, query_bias=True
        )
        self.context = nn.Sequential(
            BidirectionalLSTM(in_channels, hidden, hidden), BidirectionalLSTM(hidden, hidden, in_channels)
        )
        self.gate = nn.Linear(memory, memory)

    def remember(self, frames: Tensor) -> Tensor:
        """Contextual and visual frames, gated, `[B, N, 2 C]`."""
        context = self.context(frames)
        both = torch.cat([context, frames.to(context.dtype)], dim=2)
        return both * self.gate(both)
