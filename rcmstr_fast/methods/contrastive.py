"""SeqMoCo and RCLSTR, and the contrastive step that they share with RCMSTR."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rcmstr_fast import random
from rcmstr_fast.config import LEVELS, PretrainConfig, num_frames
from rcmstr_fast.methods.levels import RelationalSettings, used_levels
from rcmstr_fast.methods.losses import ContrastiveLoss, monitors
from rcmstr_fast.methods.network import MomentumNetwork, Network
from rcmstr_fast.methods.parts.queue import Queue, ShardedQueue, StepKeys, WholeQueue, build_queue
from rcmstr_fast.methods.permutation import PermutedQuery, permuted_order
from rcmstr_fast.methods.protocol import Batch, Collectives, Pass, PretrainMethod, StepOutput, ViewSpec, to_pixels
from rcmstr_fast.methods.registry import register


class ContrastiveMethod(PretrainMethod):
    """Relational contrastive pretraining with a momentum encoder and one queue a level (paper Eq. 7).

    A step is `begin_step`, one `forward` a micro-batch, `end_step`.

    Args:
        config: resolved configuration.
        collectives: exchange with the other processes.
    Attributes:
        beta: weight of loss_rcl beside the loss that `_online_frames` may give.
    """

    beta = 1.0

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        method = self.settings
        self.levels = used_levels(method)
        self.online = Network(config.model, self.levels, method.bn_group_size)
        self.online.encoder.checkpointing = config.train.checkpoint_activations
        self.momentum = MomentumNetwork(self.online, method)
        frames = num_frames(config.model)
        sizes = {level: self._queue_size(level, frames) for level in self.levels}
        self.queues = nn.ModuleDict(
            {
                level: build_queue(method.queue, size, config.model.feature_dim, collectives)
                for level, size in sizes.items()
            }
        )
        self.loss = ContrastiveLoss(method, frames)
        self._keys = StepKeys(self.levels, collectives)

    @property
    def settings(self) -> RelationalSettings:
        """The method's own configuration."""
        return cast(RelationalSettings, self.config.method)

    @classmethod
    def views(cls, config: PretrainConfig) -> tuple[ViewSpec, ...]:
        """Query and key, and the query with its strips permuted where that does not depend on its pixels."""
        both = ViewSpec("query"), ViewSpec("key")
        return (*both, ViewSpec("permuted", permuted_of="query")) if _ordered_ahead(config) else both

    @classmethod
    def draw(cls, config: PretrainConfig, index: Tensor, epoch: int) -> dict[str, Tensor]:
        """The order of the strips; on a GPU it would be a hundred launches of nearly nothing."""
        if not _ordered_ahead(config):
            return {}
        return {"order": permuted_order(index, epoch, cast(RelationalSettings, config.method), config.seed)}

    def exported(self) -> dict[str, nn.Module]:
        """Encoder and rectifier of the online network."""
        return {"encoder": self.online.encoder, "rectifier": self.online.rectifier}

    def _queue(self, level: str) -> Queue | ShardedQueue:
        return cast(Queue | ShardedQueue, self.queues[level])

    def _queue_size(self, level: str, frames: int) -> int:
        size = self.settings.queue_size
        if level == "frame" and self.settings.round_frame_queue:
            step = frames * int(self.config.train.global_batch_size or 1)
            return max(size - size % step, min(size, step))
        return size

    def remarks(self) -> list[str]:
        """Why the loss rises at first."""
        batch = int(self.config.train.global_batch_size or 1)
        frames = num_frames(self.config.model)
        rows = {"frame": self.settings.enqueue_per_image or frames, "subword": self.settings.num_subwords, "word": 1}
        full = max(-(-self._queue_size(level, frames) // (rows[level] * batch)) for level in self.levels)
        return [
            f"the queues hold random rows at first, which are easy to tell from keys; they are full of keys after {full} "
            "steps. Until then it is normal that the contrastive loss rises and accuracy falls. Alignment (near 1: two "
            "views of a crop agree) and spread (near 1: features of different crops differ; 0: collapse) show how the "
            "run is"
        ]

    def compile_networks(self) -> None:
        """Let torch.compile have the dense passes of both networks."""
        self.online.compile_parts()
        self.momentum.network.compile_parts()

    def begin_step(self, progress: Tensor | None = None) -> None:
        """Move the momentum network; once a step, before the first micro-batch."""
        self.momentum.update(self.online, progress)

    @classmethod
    def passes(cls, config: PretrainConfig) -> tuple[Pass, ...]:
        """Query and permuted view with gradient, the key view without."""
        permuted = (Pass(),) if cast(RelationalSettings, config.method).permute else ()
        return (Pass(), *permuted, Pass(trained=False))

    def forward(self, batch: Batch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """Loss of a micro-batch; its keys are kept until `end_step`.

        Args:
            batch: views and identities.
            monitor: also compute accuracy and spread a level.
            pictures: also return images for the contact sheet.
        """
        images, shuffled, passes = batch.views["query"], None, 1
        if self.settings.permute:
            shuffled, passes = self._permuted(batch), 2
            images = torch.cat([images, shuffled.images])
        frames, extra, shown = self._online_frames(self.online.rectify(images, passes), passes, batch, pictures)
        if pictures and shuffled is not None:
            shown["permuted"] = to_pixels(shuffled.images)
        loss, terms, watched = self._contrast(frames, shuffled, batch, monitor)
        if extra is not None:
            terms["loss_mim"] = extra.detach()
            loss = extra + self.beta * loss
        terms["loss"] = loss.detach()
        return StepOutput(loss, terms, watched, shown)

    def end_step(self, finite: Tensor | None = None) -> None:
        """Enqueue the keys of this step, of every process and micro-batch, in the order of the global batch."""
        for level, keys in self._keys.gather().items():
            self._queue(level).enqueue(keys)
        self._keys.clear()

    def _permuted(self, batch: Batch) -> PermutedQuery:
        made, order = batch.views.get("permuted"), batch.drawn.get("order")
        query, seed = batch.views["query"], self.config.seed
        return PermutedQuery(query, batch.index, batch.epoch, self.settings, seed, made, order)

    def _online_frames(
        self, images: Tensor, passes: int, batch: Batch, pictures: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Projected frames [passes * B, T, P], a loss beside loss_rcl or None, pictures.

        Args:
            images: [passes * B, 3, H, W] rectified: the query view and, with two passes, the permuted one.
            passes: 1 or 2.
            batch: as in `forward`.
            pictures: as in `forward`.
        """
        return self.online.frames(images, passes), None, {}

    def _contrast(
        self, frames: Tensor, shuffled: PermutedQuery | None, batch: Batch, monitor: bool
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """loss_rcl, its terms and monitors from the projected frames of `_online_frames`."""
        method, images = self.settings, len(batch.index)
        query = self.online.unit_rows(frames[:images], method.num_subwords)
        permuted = None if shuffled is None else self.online.permuted_rows(shuffled, frames[images:])
        key = self.momentum(batch.views["key"], method.num_subwords, self._grouping(batch))
        self._keep(key, batch)
        queues = {level: self._queue(level).whole() for level in self.levels}
        loss, terms = self.loss(query, permuted, key, queues, partial(self._inter_rows, queues))
        watched: dict[str, Tensor] = {}
        if monitor:
            for level in self.levels:
                watched |= monitors(level, query[level].detach(), key[level], queues[level].rows)
        return loss, terms, watched

    def _grouping(self, batch: Batch) -> Tensor | None:
        """Random order of the key side, so that query and key never share batch-norm statistics."""
        size = self.settings.bn_group_size
        if not self.settings.bn_shuffle or size == 0 or size >= len(batch.index):
            return None
        drawn = random.words(batch.index, 1, seed=self.config.seed, stream=random.BN_GROUPS, epoch=batch.epoch)
        return random.permutation(drawn[:, 0])

    def _keep(self, key: dict[str, Tensor], batch: Batch) -> None:
        """Remember the keys that `end_step` will exchange and enqueue."""
        kept = {}
        for level, rows in key.items():
            count = self.settings.enqueue_per_image
            images = len(batch.index)
            if level == "frame" and 0 < count < len(rows) // images:
                frames = len(rows) // images
                drawn = random.words(
                    batch.index, frames, seed=self.config.seed, stream=random.ENQUEUE, epoch=batch.epoch
                )
                chosen = random.permutation(drawn)[:, :count]
                rows = rows.unflatten(0, (images, frames)).gather(1, chosen[..., None].expand(-1, -1, rows.shape[1]))
                rows = rows.flatten(0, 1)
            kept[level] = torch.nan_to_num(rows, 0.0, 0.0, 0.0)  # a broken step must not stay in the queue
        self._keys.add(kept)

    def _inter_rows(self, queues: dict[str, WholeQueue], level: str) -> Tensor:
        """What inter-level terms compare with: the queue, or (preset rclstr_code) the queue after this step."""
        queue = queues[level]
        return queue.after(self._keys.gather()[level]) if self.settings.inter_after_enqueue else queue.rows


def _ordered_ahead(config: PretrainConfig) -> bool:
    """Whether the order of the strips is known before the query view is: moved cuts depend on its pixels."""
    method = cast(RelationalSettings, config.method)
    return bool(method.permute) and method.division != "vertical_projection"


_TINY = {"queue_size": 64, "bn_group_size": 2, "bn_shuffle": False}


@dataclass
class SeqMoCoConfig(RelationalSettings):
    """SeqMoCo: one level, no permutation, no terms between levels.

    Attributes:
        name: seqmoco.
    """

    own: ClassVar[dict[str, Any]] = {"levels": ["subword"], "permute": False, "inter": "none"}
    name: str = "seqmoco"


@register(paper="SeqMoCo, baseline of RCLSTR (Zhang et al., ACM MM 2023)", needs=("momentum", "queue"), tiny=_TINY)
class SeqMoCo(ContrastiveMethod):
    """The contrastive method on subwords alone."""

    Config = SeqMoCoConfig


@dataclass
class RCLSTRConfig(RelationalSettings):
    """RCLSTR: three levels, the permuted query, terms between levels.

    Attributes:
        name: rclstr.
    """

    own: ClassVar[dict[str, Any]] = {"levels": list(LEVELS), "permute": True, "inter": "both"}
    name: str = "rclstr"


@register(
    paper="Relational Contrastive Learning for STR (Zhang et al., ACM MM 2023)",
    needs=("momentum", "queue"),
    tiny=_TINY,
)
class RCLSTR(ContrastiveMethod):
    """The contrastive method with all relations."""

    Config = RCLSTRConfig
