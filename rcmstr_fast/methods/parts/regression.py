"""Latents of what is hidden from the latents of what is seen, and what is read from them (CAE, MaskOCR)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.methods.parts.context import heads_of
from rcmstr_fast.models.transformer import Block, sinusoids
from rcmstr_fast.ops.precision import full_precision


def cross_layers(channels: int, count: int) -> nn.ModuleList:
    """`count` pre-norm layers of attention among queries, attention to a memory, and an MLP."""
    return nn.ModuleList(
        nn.TransformerDecoderLayer(
            channels,
            heads_of(channels),
            4 * channels,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        for _ in range(count)
    )


class Regressor(nn.Module):
    """Queries at the hidden places look at what is seen, and become latents.

    Args:
        channels: C of the latents.
        places: N.
        layers: of `cross_layers`.
    """

    positions: Tensor

    def __init__(self, channels: int, places: int, layers: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(channels).normal_(std=0.02))
        self.layers = cross_layers(channels, layers)
        self.norm = nn.LayerNorm(channels)
        self.register_buffer("positions", sinusoids(places, channels), persistent=False)

    def forward(self, seen: Tensor, seen_at: Tensor, unseen: Tensor | None, wanted_at: Tensor) -> Tensor:
        """Predict.

        Args:
            seen: [B, n, C].
            seen_at: [B, n] int64 places.
            unseen: [B, n] bool, True where a row of `seen` is to be overlooked; None: nowhere.
            wanted_at: [B, m] int64 places.
        Returns:
            [B, m, C].
        """
        memory = seen + self.positions[seen_at].to(seen.dtype)
        x = self.query.to(seen.dtype) + self.positions[wanted_at].to(seen.dtype)
        for layer in self.layers:
            x = layer(x, memory, memory_key_padding_mask=unseen)
        return self.norm(x)


class StripDecoder(nn.Module):
    """Latents to pixels of their patches, by transformer blocks among them alone.

    Args:
        channels: C of the latents.
        places: N.
        pixels: values of a patch.
        layers: blocks.
    """

    positions: Tensor

    def __init__(self, channels: int, places: int, pixels: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, heads_of(channels)) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.pixels = nn.Linear(channels, pixels)
        self.register_buffer("positions", sinusoids(places, channels), persistent=False)

    def forward(self, latents: Tensor, places: Tensor) -> Tensor:
        """Latents [B, m, C] at places [B, m] int64 to [B, m, pixels]."""
        x = latents + self.positions[places].to(latents.dtype)
        for block in self.blocks:
            x = block(x)
        return self.pixels(self.norm(x))


class Reader(nn.Module):
    """A query a character looks at what is seen of a word and names the character; class 0 is the end of the word.

    Args:
        channels: C of the latents.
        places: N.
        characters: of the charset.
        longest: characters of a word.
        layers: of `cross_layers`.
    """

    positions: Tensor

    def __init__(self, channels: int, places: int, characters: int, longest: int, layers: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(longest + 1, channels).normal_(std=0.02))
        self.layers = cross_layers(channels, layers)
        self.norm = nn.LayerNorm(channels)
        self.classifier = nn.Linear(channels, 1 + characters)
        self.register_buffer("positions", sinusoids(places, channels), persistent=False)

    def forward(self, seen: Tensor, seen_at: Tensor, unseen: Tensor | None) -> Tensor:
        """Logits [B, longest + 1, 1 + characters]; arguments as of `Regressor`."""
        memory = seen + self.positions[seen_at].to(seen.dtype)
        x = self.queries.to(seen.dtype).expand(len(seen), -1, -1)
        for layer in self.layers:
            x = layer(x, memory, memory_key_padding_mask=unseen)
        return self.classifier(self.norm(x))


def read_losses(logits: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """Mean cross entropy over the characters of each word and its end, 0 for words without characters.

    Args:
        logits: [B, L + 1, 1 + K]. Receives a gradient.
        targets: [B, L] int64 characters from 0; what stands behind a word is ignored.
        lengths: [B] int64.
    Returns:
        [B] float32 (float64 for float64 logits).
    """
    place = torch.arange(logits.shape[1], device=logits.device)
    wanted = F.pad(targets + 1, (0, 1)).where(place < lengths[:, None], 0)
    each = F.cross_entropy(full_precision(logits).transpose(1, 2), wanted, reduction="none")
    return (each.where(place <= lengths[:, None], 0.0).sum(1) / (lengths + 1)).where(lengths > 0, 0.0)
