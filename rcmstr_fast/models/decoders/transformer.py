"""Transformer decoder with a key/value cache: DiG's recognition decoder."""

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.models.decoders.autoregressive import MAX_LENGTH, AutoregressiveDecoder
from rcmstr_fast.models.transformer import sinusoids

KeyValue = tuple[Tensor, Tensor]


class DecoderState(NamedTuple):
    """Between two characters.

    Attributes:
        memory: keys and values `[B, heads, N, d/heads]` of the tokens, a layer.
        characters: those of the characters so far, a layer; None before the first.
        position: characters so far.
        attend: the steps fill in `attention`.
        attention: `[B, N]`, where the last layer looked for the last character, mean over heads; None unless asked.
    """

    memory: list[KeyValue]
    characters: list[KeyValue | None]
    position: int
    attend: bool = False
    attention: Tensor | None = None


class CachedAttention(nn.Module):
    """Multi-head attention without biases, whose keys and values are computed apart from the queries."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def keys_values(self, x: Tensor) -> KeyValue:
        """x `[B, n, dim]` to keys and values `[B, heads, n, dim/heads]`."""
        keys, values = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return keys, values

    def queries(self, x: Tensor) -> Tensor:
        """x `[B, n, dim]` to `[B, heads, n, dim/heads]`."""
        return self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, keys_values: KeyValue, causal: bool = False) -> Tensor:
        """Queries from x `[B, n, dim]` to `[B, n, dim]`; causal: position i sees the keys up to i."""
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(self.queries(x), *keys_values, dropout_p=dropout, is_causal=causal)
        return self.proj(y.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, keys: Tensor) -> Tensor:
        """Where the last query of x `[B, n, dim]` looks: `[B, N]`, mean over heads."""
        q = self.queries(x[:, -1:])
        return ((q @ keys.transpose(2, 3)) / q.shape[-1] ** 0.5).softmax(3).mean(1)[:, 0]


class FeedForward(nn.Module):
    """Two linear layers around a GELU, with dropout between and after them."""

    def __init__(self, dim: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, inner)
        self.fc2 = nn.Linear(inner, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x `[.., dim]` to `[.., dim]`."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class DecoderLayer(nn.Module):
    """Pre-norm self-attention, attention to the memory, MLP; dropout on each."""

    def __init__(self, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = CachedAttention(dim, heads, dropout)
        self.cross_attention = CachedAttention(dim, heads, dropout)
        self.mlp = FeedForward(dim, inner, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, memory: KeyValue, before: KeyValue | None = None, attend: bool = False
    ) -> tuple[Tensor, KeyValue, Tensor | None]:
        """Advance.

        Args:
            x: `[B, n, dim]`: all characters where nothing is cached, else the one that follows the cached ones.
            memory: keys and values of the memory.
            before: keys and values of the characters before x.
            attend: also say where the last character looks.
        Returns:
            `[B, n, dim]`, the keys and values of all characters so far, and `[B, N]` or None.
        """
        y = self.norm1(x)
        seen = self.self_attention.keys_values(y)
        if before is not None:
            seen = torch.cat([before[0], seen[0]], dim=2), torch.cat([before[1], seen[1]], dim=2)
        x = x + self.dropout(self.self_attention(y, seen, causal=before is None))
        looking = self.norm2(x)
        attention = self.cross_attention.weights(looking, memory[0]) if attend else None
        x = x + self.dropout(self.cross_attention(looking, memory))
        return x + self.mlp(self.norm3(x)), seen, attention


class TransformerDecoder(AutoregressiveDecoder):
    """Six pre-norm layers, width 512, 8 heads, inner width 256.

    The memory goes through a linear layer and a LayerNorm and gets no positions of its own: the encoder's tokens carry
    theirs. Characters get sinusoidal positions.
    """

    default_memory = "tokens"
    positions: Tensor

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        max_length: int = MAX_LENGTH,
        layers: int = 6,
        dim: int = 512,
        heads: int = 8,
        inner: int = 256,
        dropout: float = 0.1,
    ) -> None:
        """Make a decoder; `num_classes` counts the three special classes."""
        super().__init__(max_length)
        self.entry = nn.Linear(in_channels, dim)
        self.entry_norm = nn.LayerNorm(dim, eps=1e-6)
        self.embedding = nn.Embedding(num_classes, dim)
        self.register_buffer("positions", sinusoids(max_length + 1, dim), persistent=False)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, inner, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(dim, num_classes)

    def start(self, frames: Tensor, *, attention: bool = False) -> DecoderState:
        """Keys and values of the memory in every layer, no characters."""
        memory = self.entry_norm(self.entry(frames))
        layers = cast(Iterable[DecoderLayer], self.layers)
        known = [layer.cross_attention.keys_values(memory) for layer in layers]
        return DecoderState(known, [None] * len(known), 0, attention)

    def step(self, ids: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Logits of the next character, see the base class."""
        logits, state = self._advance(ids[:, None], state)
        return logits[:, 0], state

    def forward(self, frames: Tensor, inputs: Tensor) -> Tensor:
        """Logits of all positions, see the base class."""
        return self._advance(inputs, self.start(frames))[0]

    def _advance(self, ids: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        end = state.position + ids.shape[1]
        if end > len(self.positions):
            raise ValueError(f"TransformerDecoder: words must have at most {self.max_length} characters, got {end - 1}")
        x = self.dropout(self.embedding(ids) + self.positions[state.position : end])
        seen, last, attention = [], self.layers[-1], None
        for layer, memory, before in zip(self.layers, state.memory, state.characters, strict=True):
            x, known, attention = layer(x, memory, before, state.attend and layer is last)
            seen.append(known)
        return self.classifier(self.norm(x)), DecoderState(state.memory, seen, end, state.attend, attention)
