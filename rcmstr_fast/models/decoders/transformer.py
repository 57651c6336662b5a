"""Transformer decoder with a key/value cache."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.models.decoders.autoregressive import MAX_LENGTH, AutoregressiveDecoder
from rcmstr_fast.models.vit import Mlp, sinusoids

KeyValue = tuple[Tensor, Tensor]


class DecoderState(NamedTuple):
    """Between two characters: keys and values `[B, heads, n, d/heads]` a layer, of the frames and of the characters."""

    frames: list[KeyValue]
    characters: list[KeyValue | None]
    position: int


class CachedAttention(nn.Module):
    """Multi-head attention whose keys and values are computed apart from the queries."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def keys_values(self, x: Tensor) -> KeyValue:
        """x `[B, n, dim]` to keys and values `[B, heads, n, dim/heads]`."""
        keys, values = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return keys, values

    def forward(self, x: Tensor, keys_values: KeyValue, causal: bool = False) -> Tensor:
        """Queries from x `[B, n, dim]` to `[B, n, dim]`; causal: position i sees the keys up to i."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, *keys_values, dropout_p=dropout, is_causal=causal)
        return self.proj(y.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Pre-norm self-attention, attention to the frames, MLP; dropout on each."""

    def __init__(self, dim: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attention = CachedAttention(dim, heads, dropout)
        self.cross_attention = CachedAttention(dim, heads, dropout)
        self.mlp = Mlp(dim, inner)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, frames: KeyValue, before: KeyValue | None = None) -> tuple[Tensor, KeyValue]:
        """Advance.

        Args:
            x: `[B, n, dim]`: all characters where nothing is cached, else the one that follows the cached ones.
            frames: keys and values of the frames.
            before: keys and values of the characters before x.
        Returns:
            `[B, n, dim]`, and the keys and values of all characters so far.
        """
        y = self.norm1(x)
        seen = self.self_attention.keys_values(y)
        if before is not None:
            seen = torch.cat([before[0], seen[0]], dim=2), torch.cat([before[1], seen[1]], dim=2)
        x = x + self.dropout(self.self_attention(y, seen, causal=before is None))
        x = x + self.dropout(self.cross_attention(self.norm2(x), frames))
        return x + self.dropout(self.mlp(self.norm3(x))), seen


class TransformerDecoder(AutoregressiveDecoder):
    """Six pre-norm layers, width 512, 8 heads, inner width 256, sinusoidal positions of characters and frames."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        layers: int = 6,
        dim: int = 512,
        heads: int = 8,
        inner: int = 256,
        dropout: float = 0.1,
    ) -> None:
        """Make a decoder; `num_classes` counts the three special classes."""
        super().__init__()
        self.scale = math.sqrt(dim)
        self.entry = nn.Linear(in_channels, dim)
        self.embedding = nn.Embedding(num_classes, dim)
        self.register_buffer("positions", sinusoids(MAX_LENGTH + 1, dim), persistent=False)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, inner, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(dim, num_classes)
        nn.init.normal_(self.embedding.weight, std=1 / self.scale)

    def start(self, frames: Tensor) -> DecoderState:
        """Keys and values of the frames in every layer, no characters."""
        memory = self.entry(frames)
        memory = memory + sinusoids(memory.shape[1], memory.shape[2], memory.device).to(memory.dtype)
        known = [layer.cross_attention.keys_values(memory) for layer in self.layers]
        return DecoderState(known, [None] * len(known), 0)

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
            raise ValueError(f"TransformerDecoder: words must have at most {MAX_LENGTH} characters, got {end - 1}")
        x = self.dropout(self.embedding(ids) * self.scale + self.positions[state.position : end])
        seen = []
        for layer, frames, before in zip(self.layers, state.frames, state.characters, strict=True):
            x, known = layer(x, frames, before)
            seen.append(known)
        return self.classifier(self.norm(x)), DecoderState(state.frames, seen, end)
