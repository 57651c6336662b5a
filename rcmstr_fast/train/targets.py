"""Labels as the tensors that methods with labels learn from."""

import torch
from torch import Tensor

from rcmstr_fast.charset import Charset
from rcmstr_fast.methods.parts.labels import LabelSettings


class Targets:
    """Encodes the labels of a batch.

    Args:
        settings: charset and longest label.
    Raises:
        ConfigError: the charset is neither a name nor a file.
    """

    def __init__(self, settings: LabelSettings) -> None:
        self.charset, self.longest = Charset.load(settings.charset), settings.max_length

    def __call__(self, texts: list[str | None]) -> dict[str, Tensor]:
        """`targets` [B, max_length] int64, ids from 0, -1 behind the end; `lengths` [B] int64, 0 without a label."""
        targets = torch.full((len(texts), self.longest), -1, dtype=torch.int64)
        lengths = torch.zeros(len(texts), dtype=torch.int64)
        for i, text in enumerate(texts):
            ids = self.ids(text)
            targets[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            lengths[i] = len(ids)
        return {"targets": targets, "lengths": lengths}

    def ids(self, text: str | None) -> list[int]:
        """A label's characters of the charset, as ids from 0, cut at the longest label; none without a label."""
        return self.charset.encode("".join(c for c in text or "" if c in self.charset))[: self.longest]
