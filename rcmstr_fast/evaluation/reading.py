"""Reading a set of words with a recogniser, shared out over the processes of a run."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from rcmstr_fast.evaluation.decoder_data import Feed, ahead
from rcmstr_fast.evaluation.recogniser import Recogniser
from rcmstr_fast.train.distributed import World, peers

_LINE_SECONDS = 10

_log = logging.getLogger(__name__)
T = TypeVar("T")


class WordsRead(NamedTuple):
    """What was read, in the order of the words.

    Attributes:
        texts: of each word; nothing where its picture is broken.
        confidences: in [0, 1]; 0 where its picture is broken.
        broken: positions of the words whose picture could not be decoded.
    """

    texts: list[str]
    confidences: list[float]
    broken: set[int]


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Pass items on; a bar with the time left on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        yield from tqdm(items, what, total, leave=False, file=sys.stderr, delay=1, dynamic_ncols=True)
        return
    began = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said > _LINE_SECONDS:
            left = (now - began) / done * (total - done)
            _log.info("%s: %d of %d batches, eta %s", what, done, total, tqdm.format_interval(left))
            said = now
        yield item


def gather_objects(world: World, value: T) -> list[T]:
    """The (picklable) value of every process, in the order of ranks."""
    if world.world_size == 1:
        return [value]
    found: list = [None] * world.world_size
    with peers():
        dist.all_gather_object(found, value)
    return found


def read_words(recogniser: Recogniser, feed: Feed, batch_size: int, what: str, world: World) -> WordsRead:
    """Read every word of a feed with the recogniser in evaluation mode; each process reads its share.

    Args:
        recogniser: left in evaluation mode.
        feed: the words.
        batch_size: words a forward pass.
        what: shown beside the progress.
        world: the processes; all of them must call this, and all get everything.
    """
    recogniser.eval()
    texts: dict[int, str] = {}
    confidences: dict[int, float] = {}
    batches = feed.own_batches(batch_size)
    with torch.no_grad():
        for positions, loaded in progress(ahead(feed.load, batches), len(batches), what):
            read, confidence = recogniser.read(feed.frames(positions, loaded, 0, positions))
            texts.update(zip(positions.tolist(), read))
            confidences.update(zip(positions.tolist(), confidence))
    broken = set(feed.images.broken)
    for own_texts, own_confidences, own_broken in gather_objects(world, (texts, confidences, broken)):
        texts.update(own_texts)
        confidences.update(own_confidences)
        broken |= own_broken
    return WordsRead(
        ["" if i in broken else texts[i] for i in range(len(feed))],
        [0.0 if i in broken else confidences[i] for i in range(len(feed))],
        broken,
    )
