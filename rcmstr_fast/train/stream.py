"""The data side of the loop: sources, order, loader and augmentation, from any step on."""

import logging
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from rcmstr_fast import env
from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.data.loader import LoadedBatch, Loader
from rcmstr_fast.data.overlap import files_given_twice
from rcmstr_fast.data.sampler import EpochOrder
from rcmstr_fast.data.source import open_sources
from rcmstr_fast.methods.parts.labels import LabelSettings
from rcmstr_fast.methods.protocol import Batch
from rcmstr_fast.methods.registry import find
from rcmstr_fast.train.distributed import World, use_bf16
from rcmstr_fast.train.identity import fingerprint
from rcmstr_fast.train.plan import Plan
from rcmstr_fast.train.targets import Targets
from rcmstr_fast.train.views import Make, ViewMaker

#: Records whose labels are looked at together.
_CHUNK = 4096

_log = logging.getLogger(__name__)


@dataclass
class ViewInputs:
    """What views are made of; for a GPU in page-locked memory, from where copies overlap with computation.

    Attributes:
        images: [b, H, W, 3] uint8.
        index: [b] int64 slots of the epoch.
        drawn: what the method drew for them, by name.
    """

    images: Tensor
    index: Tensor
    drawn: dict[str, Tensor]


class Stream:
    """Batches of a run. On the CPU views are made in the loader's threads, otherwise on the device.

    Args:
        config: resolved.
    Raises:
        ConfigError: no images, weights that do not fit them, or not one label for a method that learns from labels.
    """

    def __init__(self, config: PretrainConfig) -> None:
        if not config.data.roots:
            raise ConfigError("data.roots must name at least one folder of images or LMDB, got []")
        self.config = config
        spec = find(config.method.name)
        self._method = spec.method
        self.maker = ViewMaker(spec.method.views(config), config)
        self._targets = Targets(cast(LabelSettings, config.method)) if spec.labels else None
        self._source = open_sources(config.data.roots)
        for line in files_given_twice(self._source):
            _log.warning("data.roots: %s", line)
        if self._targets is not None and cast(LabelSettings, config.method).needs_labels:
            self._require_labels(self._targets)
        data = config.data
        self._order = EpochOrder(self._source.sizes, data.weights, data.epoch_size, config.seed)
        self._loader: Loader | None = None
        self._make: Make | None = None
        self._device, self._dtype = torch.device("cpu"), torch.float32

    @property
    def epoch_size(self) -> int:
        """Images an epoch."""
        return self._order.epoch_size

    @property
    def images(self) -> int:
        """Images of the data, each once."""
        return len(self._source)

    @cached_property
    def fingerprint(self) -> str:
        """What the data are recognised by."""
        return fingerprint(self._source)

    @property
    def waited(self) -> float:
        """Seconds the loop has waited for data."""
        return self._loader.waited if self._loader else 0.0

    @property
    def broken(self) -> int:
        """Broken records met (and replaced) by this process."""
        return len(self._loader.broken) if self._loader else 0

    def batches(self, step: int, plan: Plan, world: World) -> Generator[list[Batch], None, None]:
        """The micro-batches of each step from the 0-based `step` on, without end."""
        model, parts = self.config.model, self.config.train.accumulate
        self.prepare(plan, world.device)
        early = views_in_threads(world.device)

        def ahead(images: Tensor, index: Tensor, epoch: int) -> tuple[ViewInputs, dict[str, Tensor] | None]:
            inputs = self.inputs(images, index, epoch)
            return inputs, self.views(inputs, epoch) if early else None

        self._loader = Loader(
            self._source,
            self._order,
            height=model.height,
            width=model.image_width,
            data=self.config.data,
            local_batch=plan.micro_batch,
            rank=world.rank,
            world_size=world.world_size,
            accumulate=parts,
            transform=ahead,
        )
        while True:
            epoch, inside = divmod(step, plan.steps_per_epoch)
            micro: list[Batch] = []
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
            self.maker.check_dali()
            self._make = self._dali(plan.micro_batch, device)

    def inputs(self, images: Tensor, index: Tensor, epoch: int) -> ViewInputs:
        """What `views` needs of decoded images [b, H, W, 3] and their slots; for the loader's threads.

        What the method draws is drawn here, on the CPU: on a GPU it would be a hundred launches of nearly nothing.
        """
        drawn = self._method.draw(self.config, index, epoch)
        return ViewInputs(
            self._pinned(images), self._pinned(index), {name: self._pinned(x) for name, x in drawn.items()}
        )

    def views(self, inputs: ViewInputs, epoch: int) -> dict[str, Tensor]:
        """Views on the device, by name; nothing is waited for."""
        order = self._sent(inputs.drawn["order"]) if "order" in inputs.drawn else None
        views = self.maker(self._sent(inputs.images), inputs.index, epoch, order, self._dtype, self._make)
        exact = self.config.train.precision == "fp64"
        return {name: view.double() for name, view in views.items()} if exact else views

    def _batch(self, loaded: LoadedBatch, epoch: int) -> Batch:
        inputs, views = loaded.views
        views = self.views(inputs, epoch) if views is None else views
        drawn = {name: self._sent(x) for name, x in inputs.drawn.items()}
        if self._targets is not None:
            made = self._targets(self._source.labels(loaded.records.numpy()))
            drawn |= {name: self._sent(self._pinned(x)) for name, x in made.items()}
        return Batch(views, self._sent(inputs.index), epoch, drawn, images=loaded.images)

    def _require_labels(self, targets: Targets) -> None:
        """Look for a label that can be learned from; the first is enough, and usually among the first records."""
        count = len(self._source)
        for first in range(0, count, _CHUNK):
            labels = self._source.labels(range(first, min(first + _CHUNK, count)))
            if any(targets.ids(label) for label in labels):
                return
        charset = cast(LabelSettings, self.config.method).charset
        raise ConfigError(
            f"method {self.config.method.name} learns from labels: none of the {count} images of data.roots has one with a "
            f"character of charset {charset}"
        )

    def _pinned(self, x: Tensor) -> Tensor:
        return x.pin_memory() if self._device.type == "cuda" and x.device.type == "cpu" else x

    def _sent(self, x: Tensor) -> Tensor:
        return x.to(self._device, non_blocking=True)

    def _dali(self, batch: int, device: torch.device) -> Make:
        try:
            from rcmstr_fast.ops.augment_views.dali import DaliViews
        except ImportError as error:
            raise ConfigError(f"data.augment=dali must have NVIDIA DALI, which cannot be imported: {error}") from error
        return DaliViews(
            batch=self.maker.calls * batch, threads=self.config.data.workers or env.threads(), device=device
        )


def views_in_threads(device: torch.device) -> bool:
    """Whether views are made in the loader's threads; on a GPU the thread that trains launches them."""
    return device.type == "cpu"
