"""Labelled words for decoders: which of them are used, their decoded pictures, and their frames."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rcmstr_fast.charset import MAX_LENGTH, Charset
from rcmstr_fast.config import ConfigError, DataConfig
from rcmstr_fast.data.decode import Rotate, decode_batch
from rcmstr_fast.data.labelled import LabelledSet
from rcmstr_fast.data.source import ImageSource, open_sources
from rcmstr_fast.evaluation.advice import charset_warning
from rcmstr_fast.evaluation.over_encoder import OverEncoder
from rcmstr_fast.evaluation.protocols import Protocol
from rcmstr_fast.models.decoders import frames_needed
from rcmstr_fast.train.distributed import World

_GIB = 2**30
_SHOWN = 5

_log = logging.getLogger(__name__)
K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Words:
    """Labelled records.

    Attributes:
        source: where their pictures are.
        records: [n] int64 record numbers in the source.
        labels: their labels, as stored or as a protocol's targets.
    """

    source: ImageSource
    records: np.ndarray
    labels: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions: Sequence[int] | np.ndarray) -> "Words":
        """The words at these positions, in this order."""
        return Words(self.source, self.records[positions], [self.labels[i] for i in positions])

    def root_sizes(self) -> list[int]:
        """Words of each root of the source, in their order."""
        ends = np.searchsorted(self.records, np.cumsum([int(n) for n in self.source.sizes]))
        return np.diff(ends, prepend=0).tolist()

    def name(self, position: int) -> str:
        """Path (and key) of a word."""
        return self.source.name(int(self.records[position]))


def open_words(roots: Sequence[str], what: str) -> Words:
    """Every labelled record of the roots; records without a label are counted in the log.

    Args:
        roots: LMDB or image folders.
        what: the configuration field they come from, for messages.
    Raises:
        ConfigError: a root cannot be read, or no record has a label.
    """
    source = open_sources(roots)
    labels = source.labels(np.arange(len(source)))
    records = np.array([i for i, label in enumerate(labels) if label is not None], dtype=np.int64)
    if not len(records):
        raise ConfigError(
            f"{what} must hold labelled words, got {', '.join(roots)} with {len(source)} unlabelled images"
        )
    if len(records) < len(source):
        _log.warning("%s: %d of %d images have no label", what, len(source) - len(records), len(source))
    return Words(source, records, [label for label in labels if label is not None])


def training_words(
    roots: Sequence[str], protocol: Protocol, charset: Charset, *, max_length: int = MAX_LENGTH, ctc_frames: int = 0
) -> LabelledSet:
    """The records of the training roots that a decoder can learn from, labelled with the protocol's strings.

    Args:
        roots: LMDB or image folders.
        protocol: normalises the labels.
        charset: of the decoder.
        max_length: longest label in characters, after normalisation.
        ctc_frames: frames T of a CTC decoder, which cannot spell longer words; 0: another decoder.
    Raises:
        ConfigError: a root cannot be read, or no record is usable.
    """
    source = open_sources(roots)
    beyond: list[str] = []

    def reject(label: str) -> str | None:
        if not ctc_frames or frames_needed(label) <= ctc_frames:
            return None
        beyond.append(label)
        return beyond_ctc(ctc_frames)

    try:
        found = LabelledSet(
            source, charset, normalise=lambda label: protocol.target(label)[0], max_length=max_length, reject=reject
        )
    except ConfigError as error:
        raise ConfigError(f"train: {error}") from error
    if found.dropped:
        _log.warning("train: %s", found.describe())
    if ctc_frames:
        named = f": {', '.join(map(repr, beyond[:_SHOWN]))}{', ...' if len(beyond) > _SHOWN else ''}" if beyond else ""
        _log.info("train: CTC has T = %d frames a word; %d words need more%s", ctc_frames, len(beyond), named)
    labels = [label for label in source.labels(np.arange(len(source))) if label is not None]
    if warning := charset_warning("train", protocol, charset, labels, len(found)):
        _log.warning("%s", warning)
    return found


def beyond_ctc(frames: int) -> str:
    """Why a word is dropped that no CTC path over so many frames spells."""
    return f"needing more than {frames} CTC frames (length + repeats)"


def split_words(found: LabelledSet, val_fraction: float, subset: float, seed: int) -> tuple[Words, Words]:
    """A seeded random subset of the words for training, and others for validation.

    Both are cut from one random order: validation words first, so they are the same for every `subset`, and a
    smaller training set lies within a larger one.

    Args:
        found: the usable words.
        val_fraction: share of them for validation; 0: none.
        subset: share of the rest for training, in (0, 1].
        seed: the run's seed.
    Returns:
        Training words and validation words, each in the order of the records.
    Raises:
        ConfigError: no training word is left.
    """
    val = found.subset(val_fraction, seed) if val_fraction else None
    both = found.subset(min(1.0, val_fraction + subset * (1 - val_fraction)), seed)
    held_out = set(val.records.tolist()) if val else set()
    rest = [i for i, record in enumerate(both.records.tolist()) if record not in held_out]
    if not rest:
        raise ConfigError(
            f"train: {len(found)} usable words are too few for val_fraction={val_fraction} and subset={subset}"
        )
    train = Words(found.source, both.records, both.labels).take(rest)
    return train, Words(val.source, val.records, val.labels) if val else train.take([])


class WordImages:
    """Decoded pictures of words, kept in memory where all of them fit.

    Attributes:
        words: whose pictures.
        broken: position -> reason, of pictures that could not be decoded (found so far).
    """

    #: Bytes of a decoded pixel.
    channels = 3

    def __init__(
        self, words: Words, size: tuple[int, int], pool: Executor, limit_gib: float, rotate: Rotate = "never"
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            words: whose pictures.
            size: (height, width) in pixels.
            pool: decoding threads.
            limit_gib: memory limit for keeping all pictures, in GiB.
            rotate: as in `decode_image`.
        """
        self.words = words
        self.broken: dict[int, str] = {}
        self._size, self._pool, self._rotate = size, pool, rotate
        keep = self.channels * size[0] * size[1] * len(words) <= limit_gib * _GIB
        self._kept = np.zeros((len(words) if keep else 0, *size, self.channels), np.uint8)
        self._known = np.zeros(len(self._kept), bool)

    def __len__(self) -> int:
        return len(self.words)

    def get(self, positions: np.ndarray) -> np.ndarray:
        """[n, H, W, 3] uint8 pictures of n positions; black where broken."""
        if not len(self._kept):
            return self._decode(positions)
        missing = np.unique(positions[~self._known[positions]])
        if len(missing):
            self._kept[missing] = self._decode(missing)
            self._known[missing] = True
        return self._kept[positions]

    def _decode(self, positions: np.ndarray) -> np.ndarray:
        limits, records = DataConfig(), self.words.records[positions]
        self.words.source.prefetch(records)
        images, reasons = decode_batch(
            self.words.source.read(records),
            *self._size,
            max_pixels=limits.max_pixels,
            min_side=limits.min_side,
            pool=self._pool,
            rotate=self._rotate,
        )
        for i, reason in reasons.items():
            images[i] = 0
            position = int(positions[i])
            if position not in self.broken and len(self.broken) < _SHOWN:
                _log.warning("%s: broken picture: %s", self.words.name(position), reason)
            self.broken[position] = reason
        return images


class Feed:
    """Frames of words in batches, from decoded pictures or, where they never change, from memory.

    Attributes:
        images: the pictures and their words.
    """

    def __init__(self, recogniser: OverEncoder, images: WordImages, world: World, *, preset: str, seed: int) -> None:
        """Prepare.

        Args:
            recogniser: gives the frames.
            images: the pictures.
            world: the processes; each keeps the frames of the words it owns.
            preset: augmentation of `ops.augment_views`.
            seed: of the augmentation.
        """
        self.images = images
        self._recogniser, self._world = recogniser, world
        self._preset, self._seed = preset, seed
        self._frames: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def kept(self) -> bool:
        """Whether the frames are kept: then each process has those of its own words alone."""
        return self._frames is not None

    @property
    def labels(self) -> list[str]:
        """Labels of all words."""
        return self.images.words.labels

    def keep_frames(
        self, limit_gib: float, batch_size: int, progress: Callable[[Iterable[Any], int], Iterable[Any]]
    ) -> float:
        """Compute the frames of all words once, if they fit; later `frames` calls read them from memory.

        Each process does so for the words whose position is its own (position % processes == rank): the work and the
        memory are shared out, and no frames are sent around.

        Args:
            limit_gib: memory limit in GiB of each process.
            batch_size: words a forward pass.
            progress: shows the passing batches: (batches, their number) -> batches.
        Returns:
            The memory taken by each process, in GiB; 0 where they do not fit.
        """
        processes = self._world.world_size
        own = np.arange(self._world.rank, len(self), processes)
        if len(self) < processes:
            return 0.0
        with torch.no_grad():
            first = self._encode(self.images.get(own[:1]), 0, own[:1])
            most = -(-len(self) // processes)
            size = first[0].numel() * first.element_size() * most / _GIB
            if size > limit_gib:
                return 0.0
            frames = first.new_empty(len(own), *first.shape[1:])
            batches = _cut(own, batch_size)
            for where, images in progress(ahead(self.images.get, batches), len(batches)):
                frames[torch.from_numpy(where // processes).to(frames.device)] = self._encode(images, 0, where)
        self._frames = frames
        return size

    def own_batches(self, batch_size: int) -> list[np.ndarray]:
        """The positions that this process reads where each word is read once, in batches."""
        rank, processes = self._world.rank, self._world.world_size
        if self.kept:
            return _cut(np.arange(rank, len(self), processes), batch_size)
        return _cut(np.arange(len(self)), batch_size)[rank::processes]

    def load(self, positions: np.ndarray) -> np.ndarray | None:
        """What `frames` needs and a thread can prepare: the pictures, or None where the frames are kept."""
        return None if self._frames is not None else self.images.get(positions)

    def frames(self, positions: np.ndarray, loaded: np.ndarray | None, epoch: int, slots: np.ndarray) -> Tensor:
        """Frames [n, T, C] of n positions; `slots` [n] are their unique numbers in the epoch (augmentation)."""
        if self._frames is not None:
            return self._frames[torch.from_numpy(positions // self._world.world_size).to(self._world.device)]
        assert loaded is not None
        return self._encode(loaded, epoch, slots)

    def targets(
        self, positions: np.ndarray, loaded: np.ndarray | None, epoch: int, slots: np.ndarray, chosen: Sequence[int]
    ) -> Any:
        """What the network learns for the `chosen` ones of the words whose `frames` have the same arguments."""
        return [self.labels[positions[i]] for i in chosen]

    def terms(self, positions: np.ndarray) -> int:
        """How many terms the loss of these words is the mean of."""
        return self._recogniser.loss_terms([self.labels[i] for i in positions])

    def _encode(self, images: np.ndarray, epoch: int, slots: np.ndarray) -> Tensor:
        index = torch.from_numpy(slots).to(self._world.device)
        pictures = torch.from_numpy(images).to(self._world.device)
        views = self._recogniser.views(pictures, seed=self._seed, epoch=epoch, index=index, preset=self._preset)
        return self._recogniser.frames(views)


def _cut(positions: np.ndarray, size: int) -> list[np.ndarray]:
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def ahead(make: Callable[[K], T], keys: Iterable[K]) -> Iterator[tuple[K, T]]:
    """(key, make(key)) for each key, the next one made in a thread while the caller works."""
    with ThreadPoolExecutor(1) as thread:
        waiting: tuple[K, Future[T]] | None = None
        for key in keys:
            following = key, thread.submit(make, key)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def estimate_statistics(recogniser: OverEncoder, feed: Feed, batch_size: int) -> int:
    """Give an untrained encoder the running batch-norm statistics it has none of: averages over training words.

    Without them its evaluation mode divides by 1 in every layer, a far weaker baseline than an untrained network is.

    Args:
        recogniser: its encoder changes its running statistics only.
        feed: the training words.
        batch_size: words a batch; at most twenty batches, spread over the words, are taken.
    Returns:
        Words used.
    """
    layers = [
        layer for layer in recogniser.encoder.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    ]
    spread = np.linspace(0, len(feed) - 1, min(len(feed), 20 * batch_size)).astype(np.int64)
    momentum = [layer.momentum for layer in layers]
    recogniser.encoder.train()
    with torch.no_grad():
        for i, positions in enumerate(np.array_split(spread, -(-len(spread) // batch_size))):
            for layer in layers:
                layer.momentum = 1 / (i + 1)
            feed.frames(positions, feed.load(positions), 0, positions)
    for layer, value in zip(layers, momentum):
        layer.momentum = value
    recogniser.eval()
    return len(spread)
