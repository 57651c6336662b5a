"""Decoders: frames `[B, T, C]`, or tokens `[B, N, C]`, of any encoder to characters.

All have `loss(frames, targets, lengths)`, `greedy(frames) -> (ids, confidence)`, and `trace(frames)`, which also tells
the probability of each character and where the decoder looked for it. `targets` are `[B, L]` int64 with `lengths[b]`
characters in row b, without [SOS] or [EOS]; what stands behind them is ignored (-100 or a pad id). `num_classes`
counts the special classes too; characters are `num_special ..`. In `ids` every entry below `num_special` is no
character, and characters stand before them: dropping those entries gives the word.
"""

from typing import Any

from rcmstr_fast.models.decoders.attention import AttentionDecoder, SelectiveAttentionDecoder
from rcmstr_fast.models.decoders.autoregressive import EOS, MAX_LENGTH, PAD, SOS, AutoregressiveDecoder
from rcmstr_fast.models.decoders.ctc import BLANK, CTCDecoder, LinearCTCDecoder, frames_needed
from rcmstr_fast.models.decoders.trace import Trace
from rcmstr_fast.models.decoders.transformer import TransformerDecoder

Decoder = CTCDecoder | AttentionDecoder | TransformerDecoder

#: name on the command line -> class
DECODERS: dict[str, type[Decoder]] = {
    "ctc": CTCDecoder,
    "ctc_linear": LinearCTCDecoder,
    "attention": AttentionDecoder,
    "attention_rclstr": SelectiveAttentionDecoder,
    "transformer": TransformerDecoder,
}

#: decoders whose LSTM units are a choice
RECURRENT = ("ctc", "attention", "attention_rclstr")


def build_decoder(name: str, in_channels: int, characters: int, *, hidden: int, max_length: int) -> Decoder:
    """The decoder of a name, with random weights.

    Args:
        name: of `DECODERS`.
        in_channels: of what it reads.
        characters: of the charset; the special classes come on top.
        hidden: LSTM units a direction, where it has any.
        max_length: longest word in characters.
    """
    made = DECODERS[name]
    units: dict[str, Any] = {"hidden": hidden} if name in RECURRENT else {}
    return made(in_channels, made.num_special + characters, max_length=max_length, **units)


__all__ = [
    "BLANK",
    "DECODERS",
    "EOS",
    "MAX_LENGTH",
    "PAD",
    "RECURRENT",
    "SOS",
    "AttentionDecoder",
    "AutoregressiveDecoder",
    "CTCDecoder",
    "Decoder",
    "LinearCTCDecoder",
    "SelectiveAttentionDecoder",
    "Trace",
    "TransformerDecoder",
    "build_decoder",
    "frames_needed",
]
