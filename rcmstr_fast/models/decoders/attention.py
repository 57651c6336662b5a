"""Attention decoder: an LSTM cell that looks at the frames with additive attention at every character."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rcmstr_fast.models.decoders.autoregressive import AutoregressiveDecoder
from rcmstr_fast.models.recurrent import bilstm_stack


class AttentionState(NamedTuple):
    """Between two characters: memory `[B, T, M]`, its keys `[B, T, hidden]`, hidden and cell `[B, hidden]`."""

    memory: Tensor
    keys: Tensor
    hidden: Tensor
    cell: Tensor


class AttentionDecoder(AutoregressiveDecoder):
    """Two bidirectional LSTM layers beside the visual frames, additive attention (Bahdanau) and an LSTM cell."""

    def __init__(self, in_channels: int, num_classes: int, hidden: int = 256) -> None:
        """Make a decoder; `num_classes` counts the three special classes, `hidden` is LSTM units."""
        super().__init__()
        memory = in_channels + hidden
        self.context = bilstm_stack(in_channels, hidden)
        self.embedding = nn.Embedding(num_classes, hidden)
        self.key = nn.Linear(memory, hidden, bias=False)
        self.query = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.cell = nn.LSTMCell(memory + hidden, hidden)
        self.classifier = nn.Linear(hidden, num_classes)

    def start(self, frames: Tensor) -> AttentionState:
        """The visual and the contextual frames side by side, their keys, and a zero cell."""
        context = self.context(frames)
        memory = torch.cat([frames.to(context.dtype), context], dim=2)
        zero = memory.new_zeros(len(memory), self.cell.hidden_size)
        return AttentionState(memory, self.key(memory), zero, zero)

    def step(self, ids: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """Logits of the next character, see the base class."""
        state = self._advance(self.embedding(ids), state)
        return self.classifier(state.hidden), state

    def forward(self, frames: Tensor, inputs: Tensor) -> Tensor:
        """Logits of all positions, see the base class."""
        state = self.start(frames)
        hidden = []
        for embedded in self.embedding(inputs).unbind(1):
            state = self._advance(embedded, state)
            hidden.append(state.hidden)
        return self.classifier(torch.stack(hidden, dim=1))

    def _advance(self, embedded: Tensor, state: AttentionState) -> AttentionState:
        score = self.score(torch.tanh(state.keys + self.query(state.hidden)[:, None]))
        glimpse = (score.softmax(1).transpose(1, 2).to(state.memory.dtype) @ state.memory)[:, 0]
        entry = torch.cat([glimpse, embedded.to(glimpse.dtype)], dim=1)
        hidden, cell = self.cell(entry, (state.hidden, state.cell))
        return state._replace(hidden=hidden, cell=cell)
