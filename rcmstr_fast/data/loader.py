"""Batches of decoded images for one process, prepared ahead in threads, resumable at any step."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.config import ConfigError, DataConfig
from rcmstr_fast.data.decode import PillowDecoder
from rcmstr_fast.data.sampler import EpochOrder
from rcmstr_fast.data.source import ImageSource
from rcmstr_fast.tuning import choices
from rcmstr_fast.tuning.choices import Choice, Setting, Value

Transform = Callable[[Tensor, Tensor, int], Any]

_TRIES = 100
# One batch is read and decoded while another is transformed.
_BATCHES_AT_ONCE = 2

_log = logging.getLogger(__name__)


class Decoder(Protocol):
    """`PillowDecoder` or `DaliDecoder`."""

    def load(
        self, read: Callable[[np.ndarray], Any], records: np.ndarray, pool: Executor, workers: int
    ) -> tuple[Tensor, dict[int, str]]:
        """Images [B, H, W, 3] uint8 of the records, and place -> reason of the broken ones."""


def chosen_decoder(wanted: str) -> tuple[str, str]:
    """What a value of `data.decoder` means on this machine, and why.

    `auto` is DALI where there is a GPU to feed, or what a run has measured to be the fastest there, and Pillow elsewhere:
    without a GPU decoding is a hundredth of the work, and Pillow's pixels do not depend on what is installed. Where DALI
    is not installed, Pillow takes its place.

    Args:
        wanted: auto, dali, dali_mixed or pillow.
    Returns:
        dali, dali_mixed or pillow, and the reason.
    """
    if wanted == "pillow":
        return "pillow", "as ordered"
    if wanted == "auto" and not torch.cuda.is_available():
        return "pillow", "there is no GPU to feed"
    measured = choices.value(DECODER.name) if wanted == "auto" else None
    if measured is not None:
        return measured, "the fastest of this run"
    try:
        import rcmstr_fast.data.dali  # noqa: F401
    except ImportError as error:
        return "pillow", f"DALI cannot be imported ({error})"
    return ("dali", "there is a GPU to feed") if wanted == "auto" else (wanted, "as ordered")


def _decoders(setting: Setting) -> list[Value]:
    """Decoders to try: on a GPU all that there are; without one only Pillow."""
    if setting.device != "cuda":
        return []
    return list(dict.fromkeys(chosen_decoder(name)[0] for name in ("auto", "dali_mixed", "dali", "pillow")))


def _workers(setting: Setting) -> list[Value]:
    return list(dict.fromkeys([env.threads(), max(1, env.threads() // 2), 2 * env.threads(), 1]))


def _ordered_workers(setting: Setting) -> str:
    if setting.config.data.workers:
        return f"data.workers={setting.config.data.workers}"
    return "RCMSTR_FAST_THREADS" if env.threads_ordered() else ""


#: Both are timed by whole steps that wait for their data: what feeds a step fastest alone may take its processors away.
DECODER = choices.declare(
    Choice(
        "data.decoder",
        "decoder of the pictures",
        "fed_step",
        1.08,
        _decoders,
        lambda setting: chosen_decoder("auto")[0],
        lambda setting: "" if setting.config.data.decoder == "auto" else f"data.decoder={setting.config.data.decoder}",
    )
)
WORKERS = choices.declare(
    Choice("data.workers", "threads that decode", "fed_step", 1.12, _workers, lambda s: env.threads(), _ordered_workers)
)


def build_decoder(data: DataConfig, *, height: int, width: int, batch: int, workers: int) -> Decoder:
    """The decoder of `chosen_decoder`, named once in the log.

    Args:
        data: decoder, max_pixels, min_side, rotate.
        height: of the images, pixels.
        width: of the images, pixels.
        batch: largest batch.
        workers: decoding threads.
    Raises:
        ConfigError: dali_mixed without a GPU.
    """
    name, why = chosen_decoder(data.decoder)
    pillow = PillowDecoder(
        height=height, width=width, max_pixels=data.max_pixels, min_side=data.min_side, rotate=data.rotate
    )
    level = logging.INFO if data.decoder in ("auto", name) else logging.WARNING
    _log.log(level, "pictures are decoded by %s in %d threads (data.decoder=%s: %s)", name, workers, data.decoder, why)
    if name == "pillow":
        return pillow
    from rcmstr_fast.data.dali import DaliDecoder

    return DaliDecoder(pillow, batch=batch, threads=workers, mixed=name == "dali_mixed")


@dataclass
class LoadedBatch:
    """Images of one process and micro-batch.

    Attributes:
        images: [b, H, W, 3] uint8 RGB; on the GPU with `data.decoder=dali_mixed`.
        index: [b] int64 slots of the epoch, the index of every random stream.
        records: [b] int64 records of the source, replacements included.
        views: what `transform` made of them; None without one.
    """

    images: Tensor
    index: Tensor
    records: Tensor
    views: Any = None


class Loader:
    """Reads, decodes and transforms the batches of one process.

    A step's global batch is `local_batch * world_size * accumulate` consecutive positions of the epoch:
    micro-batch a of rank r is the part at `(a * world_size + r) * local_batch`, so that any division among
    processes shows the same samples. The incomplete global batch at the end of an epoch is dropped.
    A broken record is logged once and replaced by another one, drawn by (seed, epoch, slot, try).

    Attributes:
        steps_per_epoch: whole global batches in an epoch.
        broken: name -> reason of every broken record met.
        waited: seconds that the consumer spent waiting for batches.
    """

    def __init__(
        self,
        source: ImageSource,
        order: EpochOrder,
        *,
        height: int,
        width: int,
        data: DataConfig,
        local_batch: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        transform: Transform | None = None,
    ) -> None:
        """Check the sizes; nothing is read yet.

        Args:
            source: the records.
            order: over the same records.
            height: of the images, pixels.
            width: of the images, pixels.
            data: decoder, workers, prefetch, max_pixels, min_side, rotate.
            local_batch: images a micro-batch of this process.
            rank: of this process.
            world_size: processes.
            accumulate: micro-batches a step.
            transform: (images, index, epoch) -> views, called in background threads, two batches at a time.
        Raises:
            ConfigError: an epoch smaller than one global batch, or a wrong workers or prefetch.
            ValueError: source and order do not belong together.
        """
        if sum(order.sizes) != len(source):
            raise ValueError(f"Loader: order must be over the {len(source)} records, got one over {sum(order.sizes)}")
        if data.workers < 0 or data.prefetch < 1:
            raise ConfigError(
                f"data.workers must be 0 or more and data.prefetch 1 or more, got {data.workers} and {data.prefetch}"
            )
        self.source, self.order, self.transform = source, order, transform
        self._workers = data.workers or choices.value(WORKERS.name) or env.threads()
        self._decoder = build_decoder(data, height=height, width=width, batch=local_batch, workers=self._workers)
        self._prefetch = data.prefetch
        self._local_batch, self._rank, self._world_size, self._accumulate = local_batch, rank, world_size, accumulate
        self._global_batch = local_batch * world_size * accumulate
        self.steps_per_epoch = order.epoch_size // self._global_batch
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"an epoch must have at least one global batch of {self._global_batch} images, "
                f"got an epoch of {order.epoch_size}"
            )
        self.broken: dict[str, str] = {}
        self.waited = 0.0
        self._lock = threading.Lock()

    def batches(self, epoch: int, step: int = 0) -> Iterator[LoadedBatch]:
        """The batches of an epoch from a step on, `accumulate` a step.

        Args:
            epoch: 0-based.
            step: first step of the epoch to show.
        Raises:
            ConfigError: no usable record could be found for a slot, or the data have become unreadable.
        """
        starts = self._starts(step)
        with (
            ThreadPoolExecutor(1, "ahead") as fetcher,
            ThreadPoolExecutor(self._workers, "decode") as decoders,
            ThreadPoolExecutor(_BATCHES_AT_ONCE, "batch") as makers,
        ):
            pending: deque[Future[LoadedBatch]] = deque()

            def submit(count: int) -> None:
                for start in islice(starts, count):
                    chosen = fetcher.submit(self._choose, epoch, start)
                    pending.append(makers.submit(self._make, epoch, chosen, decoders))

            try:
                submit(self._prefetch)
                while pending:
                    began = time.perf_counter()
                    batch = pending.popleft().result()
                    self.waited += time.perf_counter() - began
                    submit(1)
                    yield batch
            finally:
                for future in pending:
                    future.cancel()

    def _starts(self, step: int) -> Iterator[int]:
        """First position of each micro-batch of this process."""
        for now in range(step, self.steps_per_epoch):
            for micro in range(self._accumulate):
                yield now * self._global_batch + (micro * self._world_size + self._rank) * self._local_batch

    def _choose(self, epoch: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots and records of a batch; the records are on their way into memory."""
        slots, records = self.order.slots(epoch, start, self._local_batch)
        self.source.prefetch(records)
        return slots, records

    def _make(self, epoch: int, chosen: Future[tuple[np.ndarray, np.ndarray]], decoders: Executor) -> LoadedBatch:
        slots, records = chosen.result()
        images, broken = self._load(records, decoders)
        if broken:
            self._replace(epoch, slots, records, images, broken, decoders)
        index = torch.from_numpy(slots)
        views = self.transform(images, index, epoch) if self.transform else None
        return LoadedBatch(images, index, torch.from_numpy(records), views)

    def _load(self, records: np.ndarray, decoders: Executor) -> tuple[Tensor, dict[int, str]]:
        """Images of the records, and place -> reason of the broken ones, which are logged."""
        images, broken = self._decoder.load(self.source.read, records, decoders, self._workers)
        for place, reason in sorted(broken.items()):
            self._report(self.source.name(int(records[place])), reason)
        return images, broken

    def _report(self, name: str, reason: str) -> None:
        with self._lock:
            if name in self.broken:
                return
            self.broken[name] = reason
        _log.warning("broken record %s: %s", name, reason)

    def _replace(
        self,
        epoch: int,
        slots: np.ndarray,
        records: np.ndarray,
        images: Tensor,
        broken: dict[int, str],
        decoders: Executor,
    ) -> None:
        """Put usable records into the broken places of `records` and `images`."""
        places = np.asarray(sorted(broken))
        left = np.arange(len(places))
        for tried in self.order.replacements(epoch, slots[places], _TRIES).T:
            found, still = self._load(tried[left], decoders)
            usable = np.asarray([i not in still for i in range(len(left))])
            images[torch.from_numpy(places[left[usable]])] = found[torch.from_numpy(usable)]
            records[places[left[usable]]] = tried[left[usable]]
            left = left[~usable]
            if not left.size:
                return
        name = self.source.name(int(records[places[left[0]]]))
        raise ConfigError(
            f"expected usable images, got {_TRIES} broken records in a row in the place of {name}; "
            f"for example: {self.broken[name]}"
        )
