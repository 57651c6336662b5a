"""Frames of words by the character that a decoder finds in them, and their places in a plane (scikit-learn)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rcmstr_fast.config import ConfigError, DataConfig
from rcmstr_fast.data.decode import decode_batch
from rcmstr_fast.data.source import ImageSource
from rcmstr_fast.evaluation.recogniser import Recogniser

#: A frame belongs to a character that looks at it at least this much of how it looks at its favourite frame.
_HELD = 0.5


@dataclass(frozen=True)
class CharacterFrames:
    """Frames with the character that each holds.

    Attributes:
        features: [n, C] float32.
        characters: n characters.
        words: n names of pictures.
        counts: of the words: used; misread, of which all or none are used; unread (nothing was read) and broken, of
            which none is.
    """

    features: np.ndarray
    characters: list[str]
    words: list[str]
    counts: dict[str, int]


def character_frames(
    recogniser: Recogniser, source: ImageSource, *, most: int = 3000, batch_size: int = 64, misread: bool = False
) -> CharacterFrames:
    """Frames of the words of a source, until there are enough of them.

    A frame belongs to the character for which the decoder looks at it most: with CTC the run of frames that spells it,
    with attention the frames with at least half of the weight of its strongest one (paper Figure on t-SNE). Frames
    of no character, and words that are read otherwise than they are labelled, are left out.

    Args:
        recogniser: on its device.
        source: labelled words (words without a label are taken as they are read).
        most: frames.
        batch_size: words a forward pass.
        misread: also take words that are read wrongly, with the characters that were read.
    Raises:
        ConfigError: no frame is found.
    """
    recogniser.eval()
    fold = not any(c.isupper() for c in recogniser.charset.characters)
    features: list[np.ndarray] = []
    characters: list[str] = []
    words: list[str] = []
    counts = {"used": 0, "misread": 0, "unread": 0, "broken": 0}
    for first in range(0, len(source), batch_size):
        if len(characters) >= most:
            break
        records = np.arange(first, min(first + batch_size, len(source)))
        good, frames = _frames(recogniser, source, records)
        counts["broken"] += len(records) - len(good)
        trace = recogniser.trace(frames)
        texts, labels = recogniser.texts(trace.ids), source.labels(good)
        assert trace.attention is not None
        for i, (text, label) in enumerate(zip(texts, labels)):
            wanted = label.lower() if label and fold else label
            wrong = bool(text) and wanted is not None and text != wanted
            counts["misread"] += wrong
            counts["unread"] += not text
            if not text or (wrong and not misread):
                continue
            counts["used"] += 1
            for place, character in _held(trace.ids[i], trace.attention[i], text, recogniser.decoder.num_special):
                features.append(frames[i, place].float().cpu().numpy())
                characters.append(character)
                words.append(source.name(int(good[i])))
    if len(characters) < 5:
        raise ConfigError(
            f"expected words that the recogniser reads right, for their frames, found {counts['used']} "
            f"({counts['misread']} misread, {counts['unread']} read as nothing, {counts['broken']} broken); --misread takes "
            "misread ones too"
        )
    return CharacterFrames(np.stack(features[:most]), characters[:most], words[:most], counts)


def _frames(recogniser: Recogniser, source: ImageSource, records: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Records that can be decoded, and what the decoder reads of them, [n, N, C]."""
    limits = DataConfig()
    images, broken = decode_batch(
        source.read(records),
        *recogniser.size,
        max_pixels=limits.max_pixels,
        min_side=limits.min_side,
        rotate=recogniser.rotate,
    )
    kept = [i for i in range(len(records)) if i not in broken]
    pictures = torch.from_numpy(images[kept]).to(next(recogniser.parameters()).device)
    with torch.no_grad():
        views = recogniser.views(pictures, index=torch.arange(len(kept), device=pictures.device))
        return records[kept], recogniser.frames(views)


def _held(ids: Tensor, attention: Tensor, text: str, special: int) -> Iterator[tuple[int, str]]:
    """(frame, character) of one word, from ids [L] and attention [L, N]."""
    written = attention[ids >= special][: len(text)]
    if not len(written):
        return
    held = (written >= _HELD * written.amax(1, keepdim=True)) & (written > 0)
    owner = (written * held).argmax(0)
    for place in held.any(0).nonzero()[:, 0].tolist():
        yield place, text[int(owner[place])]


def tsne(features: np.ndarray, *, perplexity: float = 30.0, seed: int = 0) -> np.ndarray:
    """Places [n, 2] of features [n, C] by t-SNE over their first 50 principal components.

    Args:
        features: n of at least 5.
        perplexity: at most a third of n is taken.
        seed: of scikit-learn.
    Raises:
        ConfigError: scikit-learn is missing.
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ConfigError("t-SNE needs scikit-learn: pip install rcmstr-fast[features]") from error
    values = features.astype(np.float64) - features.mean(0)
    if min(values.shape) > 50:
        values = PCA(50, random_state=seed).fit_transform(values)
    held = min(perplexity, (len(values) - 1) / 3)
    return TSNE(2, perplexity=held, init="pca", random_state=seed, n_jobs=1).fit_transform(values)
