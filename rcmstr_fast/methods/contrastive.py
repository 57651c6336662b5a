"""The contrastive step that SeqMoCo, RCLSTR and RCMSTR share."""

from functools import partial

import torch
from torch import Tensor, nn

from rcmstr_fast import random
from rcmstr_fast.config import PretrainConfig, num_frames, used_levels
from rcmstr_fast.methods.losses import RelationalLoss, monitors
from rcmstr_fast.methods.network import MomentumNetwork, Network
from rcmstr_fast.methods.permutation import PermutedQuery
from rcmstr_fast.methods.queue import StepKeys, WholeQueue, build_queue
from rcmstr_fast.methods.step import Collectives, StepBatch, StepOutput

PICTURES = 8


class ContrastiveMethod(nn.Module):
    """Relational contrastive pretraining with a momentum encoder and one queue a level (paper Eq. 7).

    A step is `begin_step`, one `forward` a micro-batch, `end_step`.

    Args:
        config: resolved configuration.
        collectives: exchange with the other processes.
    """

    def __init__(self, config: PretrainConfig, collectives: Collectives) -> None:
        super().__init__()
        self.config = config
        self.collectives = collectives
        method = config.method
        self.levels = used_levels(method)
        self.online = Network(config.model, self.levels, method.bn_group_size)
        self.online.encoder.checkpointing = config.train.checkpoint_activations
        self.momentum = MomentumNetwork(self.online, method.momentum)
        frames = num_frames(config.model)
        sizes = {level: self._queue_size(level, frames) for level in self.levels}
        self.queues = nn.ModuleDict({
            level: build_queue(method.queue, size, config.model.feature_dim, collectives)
            for level, size in sizes.items()
        })  # fmt: skip
        self.loss = RelationalLoss(method, frames)
        self._keys = StepKeys(self.levels, collectives)

    @property
    def online_encoder(self) -> nn.Module:
        """The encoder that is exported."""
        return self.online.encoder

    @property
    def rectifier(self) -> nn.Module:
        """The rectifier that is exported with it (`nn.Identity` for none)."""
        return self.online.rectifier

    def _queue_size(self, level: str, frames: int) -> int:
        size = self.config.method.queue_size
        if level == "frame" and self.config.method.round_frame_queue:
            step = frames * int(self.config.train.global_batch_size or 1)
            return max(size - size % step, min(size, step))
        return size

    def compile_networks(self) -> None:
        """Let torch.compile have the dense passes of both networks."""
        self.online.compile_parts()
        self.momentum.network.compile_parts()

    def begin_step(self) -> None:
        """Move the momentum network; once a step, before the first micro-batch."""
        self.momentum.update(self.online)

    def forward(self, batch: StepBatch, *, monitor: bool = True, pictures: bool = False) -> StepOutput:
        """Loss of a micro-batch; its keys are kept until `end_step`.

        Args:
            batch: views and identities.
            monitor: also compute accuracy and spread a level.
            pictures: also return images for the contact sheet.
        """
        images, shuffled, passes = batch.views[0], None, 1
        if self.config.method.permute:
            shuffled, passes = self._permuted(batch), 2
            images = torch.cat([images, shuffled.images])
        frames, extra, shown = self._online_frames(self.online.rectify(images, passes), passes, batch, pictures)
        if pictures and shuffled is not None:
            shown["permuted"] = to_pixels(shuffled.images[:PICTURES])
        loss, terms, watched = self._contrast(frames, shuffled, batch, monitor)
        if extra is not None:
            terms["loss_mim"] = extra.detach()
            loss = extra + self.config.method.beta * loss
        terms["loss"] = loss.detach()
        return StepOutput(loss, terms, watched, shown)

    def end_step(self) -> None:
        """Enqueue the keys of this step, of every process and micro-batch, in the order of the global batch."""
        for level, keys in self._keys.gather().items():
            self.queues[level].enqueue(keys)
        self._keys.clear()

    def _permuted(self, batch: StepBatch) -> PermutedQuery:
        method, seed = self.config.method, self.config.seed
        return PermutedQuery(batch.views[0], batch.index, batch.epoch, method, seed, batch.permuted, batch.order)

    def _online_frames(
        self, images: Tensor, passes: int, batch: StepBatch, pictures: bool
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
        self, frames: Tensor, shuffled: PermutedQuery | None, batch: StepBatch, monitor: bool
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """loss_rcl, its terms and monitors from the projected frames of `_online_frames`."""
        method, images = self.config.method, len(batch.index)
        query = self.online.unit_rows(frames[:images], method.num_subwords)
        permuted = None if shuffled is None else shuffled.unit_rows(self.online, frames[images:])
        key = self.momentum(batch.views[1], method.num_subwords, self._grouping(batch))
        self._keep(key, batch)
        queues = {level: self.queues[level].whole() for level in self.levels}
        loss, terms = self.loss(query, permuted, key, queues, partial(self._inter_rows, queues))
        watched: dict[str, Tensor] = {}
        if monitor:
            for level in self.levels:
                watched |= monitors(level, query[level].detach(), key[level], queues[level].rows)
        return loss, terms, watched

    def _grouping(self, batch: StepBatch) -> Tensor | None:
        """Random order of the key side, so that query and key never share batch-norm statistics."""
        size = self.config.method.bn_group_size
        if not self.config.method.bn_shuffle or size == 0 or size >= len(batch.index):
            return None
        drawn = random.words(batch.index, 1, seed=self.config.seed, stream=random.BN_GROUPS, epoch=batch.epoch)
        return random.permutation(drawn[:, 0])

    def _keep(self, key: dict[str, Tensor], batch: StepBatch) -> None:
        """Remember the keys that `end_step` will exchange and enqueue."""
        kept = {}
        for level, rows in key.items():
            count = self.config.method.enqueue_per_image
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
        return queue.after(self._keys.gather()[level]) if self.config.method.inter_after_enqueue else queue.rows


def to_pixels(images: Tensor) -> Tensor:
    """Normalised images to float32 pixels in [0, 1]."""
    return (images.detach().float() * 0.5 + 0.5).clamp(0, 1)
