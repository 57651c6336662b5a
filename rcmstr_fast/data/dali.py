"""Batches decoded and resized by NVIDIA DALI, with Pillow for whatever is not a sound, plain JPEG file."""

import io
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali import fn, types
from PIL import Image
from torch import Tensor

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.decode import TALL, PillowDecoder, chunks
from rcmstr_fast.data.jpeg import plain_jpeg

_INPUT = "encoded"

_log = logging.getLogger(__name__)


def _small_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    return file.getvalue()


class DaliDecoder:
    """Decodes whole batches; `load` has the arguments, the results and the broken records of `PillowDecoder`.

    DALI gives up the whole batch and the pipeline where one picture cannot be decoded. So only files whose headers
    are sound reach it; a batch that fails all the same is halved until the culprits are alone, and these are
    decoded (or found broken) by Pillow. Which pixels a record has never depends on its batch.

    Attributes:
        mixed: decode on the GPU.
    """

    def __init__(self, pillow: PillowDecoder, *, batch: int, threads: int, mixed: bool = False) -> None:
        """Check the device; the pipeline is built at the first batch.

        Args:
            pillow: for all other pictures; gives the size and the limits.
            batch: largest batch.
            threads: of DALI.
            mixed: decode JPEG on the GPU of the calling thread; images stay there, in the order of its current stream.
        Raises:
            ConfigError: mixed without a GPU.
        """
        if mixed and not torch.cuda.is_available():
            raise ConfigError("data.decoder=dali_mixed must have a CUDA GPU, torch finds none")
        self.mixed = mixed
        self._pillow, self._batch, self._threads = pillow, batch, threads
        self._device = torch.cuda.current_device() if mixed else None
        self._stream = torch.cuda.current_stream() if mixed else None
        self._pipeline: Any = None
        self._held: deque[list[np.ndarray]] = deque(maxlen=2)
        self._lock = threading.Lock()
        # In the place of pictures that DALI does not get, so that its output is the whole batch.
        self._filler = np.frombuffer(_small_jpeg(), np.uint8)

    def load(
        self, read: Callable[[np.ndarray], Sequence[bytes | None]], records: np.ndarray, pool: Executor, workers: int
    ) -> tuple[Tensor, dict[int, str]]:
        """Images of the records; as `PillowDecoder.load`, with `mixed` on the GPU."""
        encoded: list[np.ndarray] = [self._filler] * len(records)
        others: dict[int, np.ndarray] = {}
        broken: dict[int, str] = {}
        pillow, tallest = self._pillow, TALL if self._pillow.rotate == "tall" else math.inf

        def part(piece: slice) -> None:
            """Reads a part; keeps what DALI may get and decodes the rest."""
            items = read(records[piece])
            left = []
            for i, data in enumerate(items):
                if plain_jpeg(data, max_pixels=pillow.max_pixels, min_side=pillow.min_side, tallest=tallest):
                    encoded[piece.start + i] = np.frombuffer(data, np.uint8)  # type: ignore[arg-type]
                else:
                    left.append(i)
            self._by_pillow([piece.start + i for i in left], [items[i] for i in left], others, broken)

        list(pool.map(part, chunks(len(records), workers)))
        images, refused = self._decode(encoded)
        self._by_pillow(refused, [encoded[i].tobytes() for i in refused], others, broken)
        if others:
            self._put(images, others)
        return images, broken

    def _by_pillow(
        self, places: list[int], items: Sequence[bytes | None], others: dict[int, np.ndarray], broken: dict[int, str]
    ) -> None:
        images, found = self._pillow.decode(items)
        for i, place in enumerate(places):
            if i in found:
                broken[place] = found[i]
            else:
                others[place] = images[i]

    def _put(self, images: Tensor, others: dict[int, np.ndarray]) -> None:
        """Write pictures into the batch, in stream order on a GPU."""
        given = torch.tensor(list(others)), torch.from_numpy(np.stack(list(others.values())))
        with torch.cuda.stream(self._stream):  # does nothing for None
            places, pictures = (x.pin_memory().to(images.device, non_blocking=True) if self.mixed else x for x in given)
            images[places] = pictures

    def _decode(self, encoded: list[np.ndarray]) -> tuple[Tensor, list[int]]:
        """Images, and the places that DALI cannot decode (their images are undefined)."""
        try:
            return self._run(encoded), []
        except RuntimeError as error:
            _log.debug("DALI refused a batch of %d: %s", len(encoded), error)
        if len(encoded) == 1:
            return self._decode([self._filler])[0], [0]
        middle = len(encoded) // 2
        first, refused = self._decode(encoded[:middle])
        second, refused_too = self._decode(encoded[middle:])
        with torch.cuda.stream(self._stream):
            return torch.cat([first, second]), refused + [middle + i for i in refused_too]

    def _run(self, encoded: list[np.ndarray]) -> Tensor:
        """[n, H, W, 3] uint8 in DALI's own memory, which lives as long as the tensor.

        Raises:
            RuntimeError: a picture cannot be decoded.
        """
        with self._lock:
            pipeline = self._pipeline or self._build()
            self._pipeline = None  # after an error it is unusable
            self._held.append(encoded)  # a GPU may still read the files of one batch while the next is fed
            pipeline.feed_input(_INPUT, encoded)
            (images,) = pipeline.run(self._stream)
            self._pipeline = pipeline
        with torch.cuda.stream(self._stream):  # DLPack hands over to the current stream, which a thread has for itself
            return torch.from_dlpack(images.as_tensor())

    def _build(self) -> Any:
        @dali.pipeline_def
        def decoding() -> Any:
            encoded = fn.external_source(name=_INPUT, batch=True, dtype=types.UINT8, ndim=1, no_copy=True)
            images = fn.decoders.image(encoded, device="mixed" if self.mixed else "cpu", output_type=types.RGB)
            size = [self._pillow.height, self._pillow.width]
            return fn.resize(images, size=size, interp_type=types.INTERP_CUBIC, antialias=True)

        made = decoding(
            batch_size=self._batch,
            num_threads=self._threads,
            device_id=self._device,
            exec_dynamic=True,
            prefetch_queue_depth=1,
        )
        made.build()
        return made
