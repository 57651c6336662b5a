"""A small probe while pretraining runs: how much of a few hundred labelled words the encoder gives away so far.

It reads the weights, and nothing else of the run: it computes on a copy of the encoder, with random numbers of its
own, so that a run is bit for bit the same with it and without it.
"""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn

from rcmstr_fast import env
from rcmstr_fast.charset import Charset
from rcmstr_fast.config import ConfigError, PretrainConfig, as_list, num_frames
from rcmstr_fast.data.decode import decode_batch
from rcmstr_fast.data.labelled import seeded_share
from rcmstr_fast.data.source import open_sources
from rcmstr_fast.methods.protocol import PretrainMethod
from rcmstr_fast.models.decoders import LinearCTCDecoder, frames_needed
from rcmstr_fast.ops.augment_views import augment_views

#: Share of the words that the probe learns from; it is tested on the others.
_TRAIN = 2 / 3
_STEPS, _LR = 300, 0.03
_BATCH = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeWords:
    """The words of an online probe, decoded.

    Attributes:
        images: `[n, H, W, 3]` uint8 at the encoder's input size.
        labels: n lower-case labels.
        train: those that are learned from; the rest is tested on.
        charset: of a CTC probe; None: the words are compared as wholes, by their nearest neighbour.
    """

    images: np.ndarray
    labels: list[str]
    train: int
    charset: Charset | None


def open_probe_words(config: PretrainConfig) -> ProbeWords | None:
    """The labelled words that `train.probe_data` names, a seeded choice of `train.probe_words`; None: no probe.

    Where at least half of them can be written in `train.probe_charset` the probe is a CTC decoder, of those words.
    Otherwise it is the nearest neighbour on word level.

    Args:
        config: resolved.
    Raises:
        ConfigError: the data cannot be read, or hold too few labelled pictures.
    """
    train, data = config.train, config.data
    if not train.probe_every:
        return None
    try:
        source = open_sources(as_list(train.probe_data))
    except ConfigError as error:
        raise ConfigError(f"train.probe_data: {error}") from error
    labels = source.labels(np.arange(len(source)))
    charset = Charset.load(train.probe_charset)
    fold = not any(c.isupper() for c in charset.characters)
    named = {i: label.lower() if fold else label for i, label in enumerate(labels) if label}
    frames = num_frames(config.model)
    spelled = [i for i, x in named.items() if not charset.missing(x) and frames_needed(x) <= frames]
    ctc = 2 * len(spelled) >= len(named)
    records = np.array(spelled if ctc else list(named), dtype=np.int64)
    if len(records) < 3:
        raise ConfigError(
            f"train.probe_data must hold at least 3 labelled pictures, got {len(records)} of {len(source)} in "
            f"{', '.join(as_list(train.probe_data))}"
        )
    chosen = records[seeded_share(records, min(1.0, train.probe_words / len(records)), config.seed)]
    # The order of learned and tested words must not be that of the folder, which may be sorted by word.
    first = np.zeros(len(chosen), bool)
    first[seeded_share(chosen, _TRAIN, config.seed + 1)] = True
    chosen = np.concatenate([chosen[first], chosen[~first]])
    size = config.model.height, config.model.image_width
    with ThreadPoolExecutor(env.threads()) as pool:
        limits: dict[str, Any] = {"max_pixels": data.max_pixels, "min_side": data.min_side, "rotate": data.rotate}
        images, broken = decode_batch(source.read(chosen), *size, pool=pool, **limits)
    good = [i for i in range(len(chosen)) if i not in broken]
    count = sum(i < first.sum() for i in good)
    if not 0 < count < len(good):
        raise ConfigError(f"train.probe_data: {len(broken)} of {len(chosen)} pictures are broken, too few are left")
    return ProbeWords(images[good], [named[int(chosen[i])] for i in good], count, charset if ctc else None)


class OnlineProbe:
    """Measures an encoder as it is.

    Args:
        words: to learn from and to test on.
        method: whose encoder and rectifier are measured.
        seed: of the run.
        device: where it computes.
    """

    def __init__(self, words: ProbeWords, method: PretrainMethod, seed: int, device: torch.device) -> None:
        self.words, self.seed, self.device = words, seed, device
        self._parts = method.exported()
        images = torch.from_numpy(words.images)
        index = torch.arange(len(images))
        self._views = augment_views(
            images, seed=0, epoch=0, index=index, num_views=1, size=(images.shape[1], images.shape[2]), preset="none"
        )[0]
        kind = "the nearest neighbour of whole words" if words.charset is None else "a CTC probe"
        tested = len(words.labels) - words.train
        _log.info("online probe: %s, %d words to learn from, %d to test on", kind, words.train, tested)

    def __call__(self) -> dict[str, float]:
        """`probe_accuracy`, the share of tested words read right, and (CTC) `probe_ned`, 1 - mean edits by length."""
        frames = self._frames()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            return self._nearest(frames) if self.words.charset is None else self._ctc(frames, self.words.charset)

    @torch.no_grad()
    def _frames(self) -> Tensor:
        """Frames `[n, T, C]` float32 of a copy of the encoder in evaluation mode."""
        rectifier, encoder = (copy.deepcopy(self._parts[name]).eval() for name in ("rectifier", "encoder"))
        dtype = next((p.dtype for p in encoder.parameters()), torch.float32)
        parts = [encoder(rectifier(views.to(self.device, dtype))).float() for views in self._views.split(_BATCH)]
        return torch.cat(parts)

    def _nearest(self, frames: Tensor) -> dict[str, float]:
        """Cosine nearest neighbour of the mean frame; words that no learned word is equal to do not count."""
        features = frames.mean(1)
        count, labels = self.words.train, self.words.labels
        features = F.normalize(features - features[:count].mean(0), dim=1)
        nearest = (features[count:] @ features[:count].T).argmax(1).tolist()
        known = set(labels[:count])
        right = [labels[i] == label for i, label in zip(nearest, labels[count:]) if label in known]
        return {"probe_accuracy": sum(right) / max(1, len(right))}

    def _ctc(self, frames: Tensor, charset: Charset) -> dict[str, float]:
        """One linear layer on normalised frames, trained for a fixed number of steps over all learned words."""
        count, labels = self.words.train, self.words.labels
        learned = frames[:count].flatten(0, 1)
        frames = (frames - learned.mean(0)) / learned.std(0).clamp_min(1e-5)
        decoder = LinearCTCDecoder(frames.shape[2], 1 + len(charset)).to(frames.device)
        optimizer = torch.optim.Adam(decoder.parameters(), lr=_LR)
        ids = [torch.tensor(charset.encode(text, 1), dtype=torch.int64) for text in labels[:count]]
        lengths = torch.tensor([len(row) for row in ids], device=frames.device)
        targets = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(frames.device)
        with torch.enable_grad():
            for _ in range(_STEPS):
                optimizer.zero_grad(set_to_none=True)
                decoder.loss(frames[:count], targets, lengths).backward()
                optimizer.step()
        read, _ = decoder.greedy(frames[count:])
        texts = [charset.decode([i for i in row if i], 1) for row in read.tolist()]
        pairs = list(zip(texts, labels[count:]))
        return {
            "probe_accuracy": sum(text == label for text, label in pairs) / len(pairs),
            "probe_ned": sum(Levenshtein.normalized_similarity(*pair) for pair in pairs) / len(pairs),
        }
