"""The data side of the loop: sources, order, loader and augmentation, from any step on."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rcmstr_fast import env, ops
from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.data.loader import LoadedBatch, Loader
from rcmstr_fast.data.overlap import files_given_twice
from rcmstr_fast.data.sampler import EpochOrder
from rcmstr_fast.data.source import open_sources
from rcmstr_fast.methods.permutation import permuted_order
from rcmstr_fast.train.distributed import World, use_bf16
from rcmstr_fast.train.plan import Plan

_log = logging.getLogger(__name__)

#: Query view and key view.
VIEWS = 2


@dataclass
class ViewInputs:
    """What views are made of; for a GPU in page-locked memory, from where copies overlap with computation.

    Attributes:
        images: [b, H, W, 3] uint8.
        index: [b] int64 slots of the epoch.
        order: [b, N] int64, in which the strips of the query view are written once more; None: not at all.
    """

    images: Tensor
    index: Tensor
    order: Tensor | None


@dataclass
class TrainBatch:
    """A micro-batch of this process.

    Attributes:
        images: [b, H, W, 3] uint8, before augmentation.
        views: [2, b, 3, H, W] normalised, on the device of training; bfloat16 where the run trains in it, else float32.
        index: [b] int64 slots of the epoch, on the device of training.
        epoch: 0-based.
        permuted: [b, 3, H, W] like views, the permuted query view; None where the method makes it or needs none.
        order: [b, N] int64, of its strips, on the device of training.
    """

    images: Tensor
    views: Tensor
    index: Tensor
    epoch: int
    permuted: Tensor | None = None
    order: Tensor | None = None


class Stream:
    """Batches of a run. On the CPU views are made in the loader's threads, otherwise on the device.

    Args:
        config: resolved.
    Raises:
        ConfigError: no images, or weights that do not fit them.
    """

    def __init__(self, config: PretrainConfig) -> None:
        if not config.data.roots:
            raise ConfigError("data.roots must name at least one folder of images or LMDB, got []")
        self.config = config
        self._source = open_sources(config.data.roots)
        for line in files_given_twice(self._source):
            _log.warning("data.roots: %s", line)
        data = config.data
        self._order = EpochOrder(self._source.sizes, data.weights, data.epoch_size, config.seed)
        self._loader: Loader | None = None
        self._make: Callable[..., Tensor] = ops.augment_views
        self._device, self._dtype = torch.device("cpu"), torch.float32

    @property
    def epoch_size(self) -> int:
        """Images an epoch."""
        return self._order.epoch_size

    @property
    def waited(self) -> float:
        """Seconds the loop has waited for data."""
        return self._loader.waited if self._loader else 0.0

    @property
    def broken(self) -> int:
        """Broken records met (and replaced) by this process."""
        return len(self._loader.broken) if self._loader else 0

    def batches(self, step: int, plan: Plan, world: World) -> Iterator[list[TrainBatch]]:
        """The micro-batches of each step from the 0-based `step` on, without end."""
        model, parts = self.config.model, self.config.train.accumulate
        self.prepare(plan, world.device)
        early = views_in_threads(world.device)

        def ahead(images: Tensor, index: Tensor, epoch: int) -> tuple[ViewInputs, Tensor | None]:
            inputs = self.inputs(images, index, epoch)
            return inputs, self.views(inputs, epoch) if early else None

        self._loader = Loader(
            self._source, self._order, height=model.height, width=model.image_width, data=self.config.data,
            local_batch=plan.micro_batch, rank=world.rank, world_size=world.world_size, accumulate=parts,
            transform=ahead,
        )  # fmt: skip
        while True:
            epoch, inside = divmod(step, plan.steps_per_epoch)
            micro: list[TrainBatch] = []
            for loaded in self._loader.batches(epoch, inside):
                micro.append(self._batch(loaded, epoch))
                if len(micro) == parts:
                    step += 1
                    yield micro
                    micro = []

    def prepare(self, plan: Plan, device: torch.device) -> None:
        """Open what `views` needs on a device; before its first call."""
        self._device = device
        self._dtype = torch.bfloat16 if use_bf16(self.config.train.precision, device) else torch.float32
        if self.config.data.augment == "dali":
            self._make = self._dali(plan.micro_batch, device)

    def inputs(self, images: Tensor, index: Tensor, epoch: int) -> ViewInputs:
        """What `views` needs of decoded images [b, H, W, 3] and their slots; for the loader's threads.

        The order of the strips is drawn here, on the CPU: on a GPU it would be a hundred launches of nearly nothing.
        """
        order = self._order_of_strips(index, epoch)
        return ViewInputs(self._pinned(images), self._pinned(index), None if order is None else self._pinned(order))

    def views(self, inputs: ViewInputs, epoch: int) -> Tensor:
        """Views on the device, with the permuted query view last where the method takes one; nothing is waited for."""
        order = None if inputs.order is None else self._sent(inputs.order)
        views = self._make(
            self._sent(inputs.images), seed=self.config.seed, epoch=epoch, index=inputs.index, num_views=VIEWS,
            size=(self.config.model.height, self.config.model.image_width), order=order, dtype=self._dtype,
        )  # fmt: skip
        return views.double() if self.config.train.precision == "fp64" else views

    def _batch(self, loaded: LoadedBatch, epoch: int) -> TrainBatch:
        inputs, views = loaded.views
        views = self.views(inputs, epoch) if views is None else views
        permuted = views[VIEWS] if len(views) > VIEWS else None
        order = None if inputs.order is None else self._sent(inputs.order)
        return TrainBatch(loaded.images, views[:VIEWS], self._sent(inputs.index), epoch, permuted, order)

    def _pinned(self, x: Tensor) -> Tensor:
        return x.pin_memory() if self._device.type == "cuda" and x.device.type == "cpu" else x

    def _sent(self, x: Tensor) -> Tensor:
        return x.to(self._device, non_blocking=True)

    def _dali(self, batch: int, device: torch.device) -> Callable[..., Tensor]:
        try:
            from rcmstr_fast.ops.augment_dali import DaliViews
        except ImportError as error:
            raise ConfigError(f"data.augment=dali must have NVIDIA DALI, which cannot be imported: {error}") from error
        return DaliViews(batch=VIEWS * batch, threads=self.config.data.workers or env.threads(), device=device)

    def _order_of_strips(self, index: Tensor, epoch: int) -> Tensor | None:
        """The order in which the query view is written once more; None where the view itself decides on the cuts."""
        method = self.config.method
        if not method.permute or method.division == "vertical_projection":
            return None
        return permuted_order(index, epoch, method, self.config.seed)


def views_in_threads(device: torch.device) -> bool:
    """Whether views are made in the loader's threads; on a GPU the thread that trains launches them."""
    return device.type == "cpu"
