"""Decoders: frames `[B, T, C]` of any encoder to characters.

All have `loss(frames, targets, lengths)` and `greedy(frames) -> (ids, confidence)`. `targets` are `[B, L]` int64
with `lengths[b]` characters in row b, without [SOS] or [EOS]; what stands behind them is ignored (-100 or a pad id).
`num_classes` counts the special classes too; characters are `num_special ..`. In `ids` every entry below
`num_special` is no character, and characters stand before them: dropping those entries gives the word.
"""

from rcmstr_fast.models.decoders.attention import AttentionDecoder
from rcmstr_fast.models.decoders.autoregressive import EOS, MAX_LENGTH, PAD, SOS, AutoregressiveDecoder
from rcmstr_fast.models.decoders.ctc import BLANK, CTCDecoder
from rcmstr_fast.models.decoders.transformer import TransformerDecoder

Decoder = CTCDecoder | AttentionDecoder | TransformerDecoder

#: name on the command line -> class
DECODERS: dict[str, type[Decoder]] = {
    "ctc": CTCDecoder,
    "attention": AttentionDecoder,
    "transformer": TransformerDecoder,
}

__all__ = [
    "BLANK", "DECODERS", "EOS", "MAX_LENGTH", "PAD", "SOS",
    "AttentionDecoder", "AutoregressiveDecoder", "CTCDecoder", "Decoder", "TransformerDecoder",
]  # fmt: skip
