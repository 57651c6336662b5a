"""The contrastive step that SeqMoCo, RCLSTR and RCMSTR share."""

import torch
from torch import Tensor, nn

from rcmstr_fast import ops, random
from rcmstr_fast.config import PretrainConfig, num_frames
from rcmstr_fast.methods.losses import RelationalLoss, monitors
from rcmstr_fast.methods.network import MomentumNetwork, Network
from rcmstr_fast.methods.permutation import PermutedQuery
from rcmstr_fast.methods.queue import Queue
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
        self.levels = self._network_levels()
        self.online = Network(config.model, self.levels, method.bn_group_size)
        self.momentum = MomentumNetwork(self.online, method.momentum)
        frames = num_frames(config.model)
        self.queues = nn.ModuleDict(
            {level: Queue(self._queue_size(level, frames), config.model.feature_dim) for level in self.levels}
        )
        self.loss = RelationalLoss(method, frames)
        self._keys: dict[str, list[Tensor]] = {level: [] for level in self.levels}

    @property
    def online_encoder(self) -> nn.Module:
        """The encoder that is exported."""
        return self.online.encoder

    @property
    def rectifier(self) -> nn.Module:
        """The rectifier that is exported with it (`nn.Identity` for none)."""
        return self.online.rectifier

    def _network_levels(self) -> list[str]:
        """Levels with a loss of their own or as a side of an inter-level term."""
        used = set(self.config.method.levels or ())
        if self.config.method.inter in ("f2s", "both"):
            used |= {"frame", "subword"}
        if self.config.method.inter in ("s2w", "both"):
            used |= {"subword", "word"}
        return [level for level in ("frame", "subword", "word") if level in used]

    def _queue_size(self, level: str, frames: int) -> int:
        size = self.config.method.queue_size
        if level == "frame" and self.config.method.round_frame_queue:
            step = frames * int(self.config.train.global_batch_size or 1)
            return max(size - size % step, min(size, step))
        return size

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
        query_view = self.online.rectifier(batch.views[0])
        frames, extra, shown = self._query_frames(query_view, batch, pictures)
        loss, terms, watched, sheet = self._contrast(frames, batch, monitor, pictures)
        if extra is not None:
            terms["loss_mim"] = extra.detach()
            loss = extra + self.config.method.beta * loss
        terms["loss"] = loss.detach()
        return StepOutput(loss, terms, watched, {**sheet, **shown})

    def end_step(self) -> None:
        """Enqueue the keys of this step, of every process and micro-batch, in the order of the global batch."""
        for level, kept in self._keys.items():
            for keys in kept:
                self.queues[level].enqueue(keys)
            kept.clear()

    def _query_frames(
        self, images: Tensor, batch: StepBatch, pictures: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Projected query frames [B, T, P], a loss beside loss_rcl or None, pictures."""
        return self.online.frames(images), None, {}

    def _contrast(
        self, frames: Tensor, batch: StepBatch, monitor: bool, pictures: bool
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        method = self.config.method
        query = self.online.features(ops.hierarchical_pool(frames, method.num_subwords))
        permuted, sheet = None, {}
        if method.permute:
            shuffled = PermutedQuery(batch.views[0], batch.index, batch.epoch, method, self.config.seed, batch.permuted)
            pooled = shuffled.pool(self.online.frames(self.online.rectifier(shuffled.images)))
            permuted = self.online.features(pooled)
            if pictures:
                sheet["permuted"] = to_pixels(shuffled.images[:PICTURES])
        key = self.momentum(batch.views[1], method.num_subwords, self._grouping(batch))
        self._keep(key, batch)
        queues = {level: self.queues[level] for level in self.levels}
        loss, terms = self.loss(query, permuted, key, queues, self._inter_queues())
        watched: dict[str, Tensor] = {}
        if monitor:
            for level in self.levels:
                watched |= monitors(level, query[level].detach(), key[level], self.queues[level].rows)
        return loss, terms, watched, sheet

    def _grouping(self, batch: StepBatch) -> Tensor | None:
        """Random order of the key side, so that query and key never share batch-norm statistics."""
        size = self.config.method.bn_group_size
        if not self.config.method.bn_shuffle or size == 0 or size >= len(batch.index):
            return None
        drawn = random.words(batch.index, 1, seed=self.config.seed, stream=random.BN_GROUPS, epoch=batch.epoch)
        return random.permutation(drawn[:, 0])

    def _keep(self, key: dict[str, Tensor], batch: StepBatch) -> None:
        """Remember the keys that `end_step` will enqueue."""
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
            rows = torch.nan_to_num(rows, 0.0, 0.0, 0.0)  # a broken step must not stay in the queue
            self._keys[level].append(self.collectives.gather(rows.contiguous()))

    def _inter_queues(self) -> dict[str, Tensor]:
        """What inter-level terms compare with: the queue, or (preset rclstr_code) the queue after this step."""
        if not self.config.method.inter_after_enqueue:
            return {level: self.queues[level].rows for level in self.levels}
        return {level: self.queues[level].after(torch.cat(self._keys[level])) for level in self.levels}


def to_pixels(images: Tensor) -> Tensor:
    """Normalised images to float32 pixels in [0, 1]."""
    return (images.detach().float() * 0.5 + 0.5).clamp(0, 1)
