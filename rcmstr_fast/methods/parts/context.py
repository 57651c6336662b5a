"""Telling hidden features by their context: quantised targets, attention over the rest (after wav2vec 2.0)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast.models.transformer import sinusoids
from rcmstr_fast.ops.precision import full_precision

#: Channels of an attention head, where they divide what there is.
HEAD = 32


def heads_of(channels: int) -> int:
    """Attention heads of about `HEAD` channels each."""
    return math.gcd(channels, max(1, channels // HEAD))


def gumbel(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Words of `random.words` to standard Gumbel noise, by float64 logarithms."""
    u = ((words >> 8).double() + 0.5) * 2.0**-24
    return (-torch.log(-torch.log(u))).to(dtype)


class Quantiser(nn.Module):
    """Features to sums of learned codes: one of `entries` vectors in each of `groups` books (Jang et al., ICLR 2017).

    Args:
        channels: of a feature.
        groups: G.
        entries: V a book.
        dim: D of the result, a multiple of G.
        deviation: of the new weights of the choice. 1, as in wav2vec 2.0, makes choices clear from the first step.
    """

    def __init__(self, channels: int, groups: int, entries: int, dim: int, deviation: float = 1.0) -> None:
        super().__init__()
        self.shape = groups, entries
        self.choose = nn.Linear(channels, groups * entries)
        nn.init.normal_(self.choose.weight, std=deviation)
        nn.init.zeros_(self.choose.bias)
        self.books = nn.Parameter(torch.randn(groups, entries, dim // groups) / math.sqrt(dim // groups))
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: Tensor, noise: Tensor, temperature: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise; the gradient is that of the softmax.

        Args:
            x: [B, M, C].
            noise: [B, M, G, V] Gumbel noise.
            temperature: of the softmax.
        Returns:
            rows [B, M, D]; codes [B, M, G] int64; probabilities [B, M, G, V] of the entries without noise.
        """
        logits = full_precision(self.choose(x)).unflatten(2, self.shape)
        soft = ((logits + noise) / temperature).softmax(-1)
        codes = soft.argmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, codes[..., None], 1.0)
        chosen = hard + (soft - soft.detach())
        rows = torch.einsum("bmgv,gvd->bmgd", chosen, full_precision(self.books)).flatten(2)
        return self.mix(rows), codes, logits.softmax(-1)


class ContextPerceiver(nn.Module):
    """One level: some positions are hidden, attention over a map says what they were.

    Args:
        channels: of the map.
        size: (h, w) of the map.
        groups: as of `Quantiser`.
        entries: as of `Quantiser`.
        dim: of contexts and targets.
        layers: transformer layers.
        window: rows and columns to each side that a position sees; None: all.
        deviation: as of `Quantiser`.
    """

    positions: Tensor

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        *,
        groups: int,
        entries: int,
        dim: int,
        layers: int,
        window: int | None,
        deviation: float = 1.0,
    ) -> None:
        super().__init__()
        self.quantiser = Quantiser(channels, groups, entries, dim, deviation)
        self.hidden = nn.Parameter(torch.empty(channels).uniform_())
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                channels,
                heads_of(channels),
                2 * channels,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        self.predict = nn.Linear(channels, dim)
        self.register_buffer("positions", sinusoids(size[0] * size[1], channels), persistent=False)
        self.register_buffer("far", None if window is None else beyond(size, window), persistent=False)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """What the context of hidden positions says of them.

        Args:
            x: [B, N, C] features of the map, row by row.
            hidden: [B, M] int64 positions.
        Returns:
            [B, M, D].
        """
        covered = torch.zeros_like(x[..., 0], dtype=torch.bool).scatter(1, hidden, True)
        seen = torch.where(covered[..., None], self.hidden.to(x.dtype), x) + self.positions.to(x.dtype)
        for layer in self.layers:
            seen = layer(seen, src_mask=self.far)
        return self.predict(_at(seen, hidden))

    def targets(
        self, x: Tensor, hidden: Tensor, noise: Tensor, temperature: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What hidden positions are.

        Args:
            x: [B, N, C].
            hidden: [B, M] int64.
            noise: [B, M, G, V].
            temperature: of the quantiser.
        Returns:
            rows [B, M, D], codes [B, M, G] and probabilities [B, M, G, V] of the quantiser.
        """
        return self.quantiser(_at(x, hidden), noise, temperature)


def _at(rows: Tensor, places: Tensor) -> Tensor:
    """Rows [B, N, D] at positions [B, M]: [B, M, D]."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[2]))


def beyond(size: tuple[int, int], window: int) -> Tensor:
    """[h w, h w] bool: True where two positions of a map lie more than `window` rows or columns apart."""
    rows, columns = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij"))
    return ((rows[:, None] - rows).abs() > window) | ((columns[:, None] - columns).abs() > window)


def told_apart(
    contexts: Tensor, hidden: Tensor, targets: Tensor, places: Tensor, *, first: int, size: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """InfoNCE of each hidden position: its own target against those of the same position of the other images.

    An image that does not hide the position is no rival there. Rivals at other positions are left out on purpose: a
    code for the position alone would tell them apart.

    Args:
        contexts: [B, M, D] of this process. Receives a gradient.
        hidden: [B, M] int64 in [0, N), different within an image.
        targets: [A, M, D] of all processes. Receives a gradient.
        places: [A, M] int64, `hidden` of all processes.
        first: number of this process's first image among all.
        size: N, the positions of a map.
        temperature: of the cosines.
    Returns:
        loss [B, M], and [B, M] bool: the own target is the most similar one.
    """
    c, t = (F.normalize(full_precision(x), dim=2) for x in (contexts, targets))
    similar = _on_map(c, hidden, size) @ _on_map(t, places, size).transpose(1, 2) / temperature
    there = torch.zeros(size, len(t), dtype=torch.bool, device=t.device).scatter(0, places.t(), True)
    similar = similar.masked_fill(~there[:, None], -torch.inf)
    at = hidden.t()[..., None].expand(-1, -1, len(t))
    similar = similar.gather(0, at).transpose(0, 1)
    own = first + torch.arange(len(c), device=c.device)[:, None, None].expand(-1, similar.shape[1], 1)
    loss = similar.logsumexp(2) - similar.gather(2, own)[..., 0]
    return loss, similar.argmax(2) == own[..., 0]


def _on_map(rows: Tensor, places: Tensor, size: int) -> Tensor:
    """Rows [B, M, D] at positions [B, M] of [N, B, D]; zero elsewhere."""
    blank = rows.new_zeros(len(rows), size, rows.shape[2])
    return blank.scatter(1, places[..., None].expand_as(rows), rows).transpose(0, 1)


def unused(mean: Tensor) -> Tensor:
    """Share of the codes that are not used: 1 - sum over books of the perplexity / (G V), 0-d.

    Args:
        mean: [G, V] mean probability of each entry. Receives a gradient.
    """
    perplexity = torch.exp(-(mean * mean.clamp(min=1e-12).log()).sum(1))
    return 1.0 - perplexity.sum() / mean.numel()
