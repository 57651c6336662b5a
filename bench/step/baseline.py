"""The whole pretraining step in plain PyTorch, eager or compiled: what our step is compared with.

The same mathematics from the same weights: nn.Conv2d and nn.BatchNorm2d, dense convolution times mask, queue losses by
softmax over chunks of rows whose gradient is taken chunk by chunk (the similarities of one level alone are gigabytes
at the training size), torch's fused optimiser, foreach momentum update, bf16 autocast and channels_last on a GPU, TF32
allowed. A test compares loss and gradients with ours.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.step import networks
from rcmstr_fast.config import ConfigError, ModelConfig, PretrainConfig
from rcmstr_fast.measure.running import StepInputs
from rcmstr_fast.methods.levels import RelationalSettings, used_levels
from rcmstr_fast.methods.permutation import pairing_windows
from rcmstr_fast.ops import reference
from rcmstr_fast.train.optim import build_optimizer

#: Similarities (row, queue row) of one chunk of a loss: half a gigabyte in float32.
CHUNK = 1 << 27


class Network(nn.Module):
    """Encoder, projector, one predictor a level."""

    def __init__(self, model: ModelConfig, levels: list[str]) -> None:
        super().__init__()
        vit = model.encoder.startswith("vit")
        hidden, dim = model.projector_hidden, model.feature_dim
        self.encoder = networks.VisionTransformer(model) if vit else networks.ResNet29(model.width)
        channels = self.encoder.out_channels
        if vit:
            self.projector: nn.Module = networks.Rows(channels, hidden, dim)
            self.predictors = nn.ModuleDict({level: networks.Rows(dim, hidden, dim) for level in levels})
        else:
            layers = [networks.LSTMLayer(channels, hidden), networks.LSTMLayer(hidden, hidden)]
            self.projector = nn.ModuleDict({"layers": nn.Sequential(*layers)})
            self.predictors = nn.ModuleDict(
                {level: nn.ModuleDict({"linear": nn.Linear(hidden, dim)}) for level in levels}
            )
        self.vit = vit

    def forward(self, images: Tensor, num_subwords: int, order: Tensor | None = None) -> dict[str, Tensor]:
        """Images to unit rows a level; `order` undoes a permutation of strips."""
        return self.rows(self.project(self.encoder(images)), num_subwords, order)

    def project(self, frames: Tensor) -> Tensor:
        """Frames of the encoder `[B, T, C]` to projected frames."""
        return self.projector(frames) if self.vit else self.projector["layers"](frames)

    def rows(self, frames: Tensor, num_subwords: int, order: Tensor | None = None) -> dict[str, Tensor]:
        """Projected frames to unit rows a level."""
        pooled = reference.hierarchical_pool(frames, num_subwords, order=order)
        rows = {}
        for level, predictor in self.predictors.items():
            x = getattr(pooled, level)
            x = predictor(x) if self.vit else predictor["linear"](x)
            rows[level] = F.normalize(x.float(), dim=-1).flatten(0, 1)
        return rows


def similarities(rows: Tensor, queue: Tensor) -> Tensor:
    """rows @ queue^T in float32 (TF32 on a GPU): in half precision the small gradients of a mean would vanish."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ queue.T


def symmetric_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """1/2 KL(P|Q) + 1/2 KL(Q|P), summed over every axis."""
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()


def ere_chunk(
    queries: list[Tensor], key: Tensor, queue: Tensor, tau_info: float, tau_kl: float, alpha: float
) -> Tensor:
    """loss_ere (Eq. 4) of some rows, summed over them."""
    log_p = F.log_softmax(similarities(key, queue) / tau_kl, dim=1)
    total = key.new_zeros(())
    for query in queries:
        similarity = similarities(query, queue)
        logits = torch.cat([(query * key).sum(1, keepdim=True), similarity], dim=1) / tau_info
        total = total - F.log_softmax(logits, dim=1)[:, 0].sum()
        if alpha:
            total = total + alpha * symmetric_kl(F.log_softmax(similarity / tau_kl, dim=1), log_p)
    return total / len(queries)


def pair_chunk(low: Tensor, high: Tensor, queue: Tensor, tau: float, windows: list[tuple[int, int]]) -> Tensor:
    """loss_f2s or loss_s2w (Eq. 6) of some images, summed over pairs: low `[b, n, D]`, high `[b, S, D]`."""
    log_q = F.log_softmax(similarities(low.flatten(0, 1), queue) / tau, dim=1).unflatten(0, low.shape[:2])
    log_p = F.log_softmax(similarities(high.flatten(0, 1), queue) / tau, dim=1).unflatten(0, high.shape[:2])
    parts = [symmetric_kl(log_q[:, a:b], log_p[:, s : s + 1]) for s, (a, b) in enumerate(windows)]
    return torch.stack(parts).sum()


def by_chunks(loss: Callable[..., Tensor], leaves: list[Tensor], constants: Tensor, size: int, weight: float) -> Tensor:
    """Add up weight * loss(leaves, constants) over chunks of `size` rows, taking each chunk's gradient at once."""
    total = constants.new_zeros(())
    for start in range(0, len(constants), size):
        here = slice(start, start + size)
        part = weight * loss([leaf[here] for leaf in leaves], constants[here])
        part.backward()
        total = total + part.detach()
    return total


class Baseline(nn.Module):
    """State and step of the baseline.

    Args:
        config: resolved.
        device: where it runs.
        precision: bf16 (autocast) or fp32.
        compiled: mode of torch.compile for networks and losses; empty: eager.
    Raises:
        ConfigError: a switch that the baseline does not have.
    """

    def __init__(self, config: PretrainConfig, device: torch.device, *, bf16: bool, compiled: str = "") -> None:
        super().__init__()
        check(config)
        self.config, self.device, self.bf16 = config, device, bf16
        method = config.method
        self.levels = used_levels(method)
        self.online = Network(config.model, self.levels)
        self.momentum = nn.ModuleDict({"network": copy.deepcopy(self.online).requires_grad_(False)})
        self.queues = nn.ModuleDict({level: nn.Module() for level in self.levels})
        for queue in self.queues.values():
            queue.register_buffer("rows", F.normalize(torch.randn(method.queue_size, config.model.feature_dim), dim=1))
            queue.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        if method.name == "rcmstr":
            size = (config.model.height, config.model.image_width)
            head = networks.TokenHead if self.online.vit else networks.FrameHead
            self.mim = nn.ModuleDict({"head": head(self.online.encoder.out_channels, size)})
        self.to(device, memory_format=torch.channels_last).train()
        self.frames = 1 + config.model.image_width // 4 - self.online.vit
        wrap = (lambda f: torch.compile(f, mode=compiled, dynamic=False)) if compiled else (lambda f: f)
        self._features, self._reconstruct = wrap(self.online.forward), wrap(self.reconstruct)
        self._key_features = wrap(self.momentum["network"].forward)
        self._ere, self._pairs = wrap(ere_chunk), wrap(pair_chunk)
        self.optimizer = build_optimizer(self, config.optim)

    def step(self, batch: StepInputs) -> Tensor:
        """One step of the training; returns the loss, detached."""
        self.follow()
        self.optimizer.zero_grad()
        loss, key = self.gradients(batch)
        self.optimizer.step()
        self.enqueue(key)
        return loss

    @torch.no_grad()
    def follow(self) -> None:
        """Move the momentum network."""
        targets, sources = list(self.momentum.parameters()), list(self.online.parameters())
        torch._foreach_lerp_(targets, sources, 1.0 - self.config.method.momentum)

    def gradients(self, batch: StepInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the batch with the gradients left in the parameters, and its keys."""
        method = self.config.method
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            reconstruction = None
            if method.name == "rcmstr":
                masks = self.masks(batch)
                reconstruction = self._reconstruct(batch.query, masks.grid, masks.pixels)
            queries = [self._features(batch.query, method.num_subwords)]
            if method.permute:
                order = batch.order if batch.order is not None else self.order(batch)
                permuted = batch.permuted if batch.permuted is not None else self.permute(batch.query, order)
                queries.append(self._features(permuted, method.num_subwords, order))
            with torch.no_grad():
                key = self._key_features(batch.key, method.num_subwords)
            leaves = [{level: x.detach().requires_grad_() for level, x in query.items()} for query in queries]
            scale = method.beta if reconstruction is not None else 1.0
            loss = self.contrast(leaves, key, scale)
        used = [(q[level], leaf[level]) for q, leaf in zip(queries, leaves) for level in q]
        used = [(x, leaf) for x, leaf in used if leaf.grad is not None]
        tensors, gradients = [x for x, _ in used], [leaf.grad for _, leaf in used]
        if reconstruction is not None:
            tensors, gradients, loss = [*tensors, reconstruction], [*gradients, None], loss + reconstruction.detach()
        torch.autograd.backward(tensors, gradients)
        return loss, key

    def contrast(self, queries: list[dict[str, Tensor]], key: dict[str, Tensor], scale: float) -> Tensor:
        """scale * loss_rcl; its gradients are left in the query rows."""
        method, dim = self.config.method, self.config.model.feature_dim
        rows = max(1, CHUNK // method.queue_size)
        alpha = method.alpha if method.kl else 0.0
        total = key[self.levels[0]].new_zeros(())
        for level in method.levels or ():
            queue = self.queues[level].rows

            def ere(q: list[Tensor], p: Tensor, queue: Tensor = queue) -> Tensor:
                return self._ere(q, p, queue, method.tau_info, method.tau_kl, alpha)

            total = total + by_chunks(ere, [q[level] for q in queries], key[level], rows, scale / len(key[level]))
        for name, low, high in (("f2s", "frame", "subword"), ("s2w", "subword", "word")):
            if method.inter not in (name, "both"):
                continue
            windows = self.windows(name)
            tops = key[high].view(-1, len(windows), dim)
            pairs = sum(b - a for a, b in windows) * len(tops)
            bottom = queries[0][low].view(len(tops), -1, dim)
            queue = self.queues[high].rows

            def between(q: list[Tensor], p: Tensor, queue: Tensor = queue, windows: list = windows) -> Tensor:
                return self._pairs(q[0], p, queue, method.tau_kl, windows)

            images = max(1, rows // bottom.shape[1])
            weight = scale * float(method.inter_weight or 0.0) / pairs
            total = total + by_chunks(between, [bottom], tops, images, weight)
        return total

    def windows(self, name: str) -> list[tuple[int, int]]:
        """Which low rows of an image pair with each of its high rows."""
        method = self.config.method
        if name == "s2w":
            return [(0, method.num_subwords)]
        return pairing_windows(self.frames, method.num_subwords, method.inter_pairing)

    def reconstruct(self, images: Tensor, grid: Tensor, pixels: Tensor) -> Tensor:
        """loss_mim of the masked images."""
        masks = reference.Masks(grid, pixels)
        features, active = self.online.encoder.forward_masked(images, masks, self.config.method.mask_rule)
        prediction = self.mim["head"](features, active)
        return reference.masked_mse(prediction.float(), images.float() * 0.5 + 0.5, pixels)

    def masks(self, batch: StepInputs) -> reference.Masks:
        """The masks of the batch."""
        method, model = self.config.method, self.config.model
        return reference.draw_masks(
            batch.index,
            seed=self.config.seed,
            epoch=batch.epoch,
            size=(model.height, model.image_width),
            unit="token" if self.online.vit else method.mask_unit,
            mask_ratio=method.mask_ratio,
            num_blocks=method.num_blocks,
        )

    def order(self, batch: StepInputs) -> Tensor:
        """The permutation of the batch."""
        method = self.config.method
        return reference.draw_order(
            batch.index,
            seed=self.config.seed,
            epoch=batch.epoch,
            num_patches=method.num_patches,
            group_size=method.group_size,
            shared=bool(method.shared_permutation),
        )

    def permute(self, images: Tensor, order: Tensor) -> Tensor:
        """The images with their strips in that order."""
        method = self.config.method
        return reference.permute_strips(images, order, num_patches=method.num_patches, group_size=method.group_size)

    @torch.no_grad()
    def enqueue(self, key: dict[str, Tensor]) -> None:
        """Write the keys over the oldest rows of each queue."""
        for level, rows in key.items():
            queue = self.queues[level]
            rows = rows[-len(queue.rows) :]
            place = (queue.pointer + torch.arange(len(rows), device=rows.device)) % len(queue.rows)
            queue.rows[place] = rows
            queue.pointer.add_(len(rows)).remainder_(len(queue.rows))


#: Switches that the baseline lacks, with the value at which it computes what the method computes.
_FIXED = {
    "coupled": False,
    "mim_view": "query",
    "division": "direct",
    "inter_loss": "kl",
    "kl_reduction": "sum",
    "inter_after_enqueue": False,
    "round_frame_queue": False,
    "enqueue_per_image": 0,
    "bn_group_size": 0,
    "norm_pix": False,
}


def lacks(config: PretrainConfig) -> str:
    """The method or the first switch of a configuration that the baseline does not have; empty: it has all."""
    method = config.method
    if not isinstance(method, RelationalSettings):
        return f"method.name={method.name}"
    given = {f"method.{name}": (getattr(method, name, fixed), fixed) for name, fixed in _FIXED.items()}
    given |= {"model.tps": (config.model.tps, "none"), "train.accumulate": (config.train.accumulate, 1)}
    return next((f"{name}={value}" for name, (value, fixed) in given.items() if value != fixed), "")


def check(config: PretrainConfig) -> None:
    """Raise ConfigError where the configuration has a switch that the baseline lacks."""
    if missing := lacks(config):
        raise ConfigError(f"the baseline step does not have {missing}; measure with --providers ours")
