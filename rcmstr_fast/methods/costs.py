"""What a training step must do at least: floating-point operations and bytes of its parts, and the time they need.

Counted is what the mathematics asks for: hidden sites of a CNN's masked pass are not computed, nothing is computed
twice, a matrix product's operands are read once and its result is written once. A multiply-add is two operations.

Every method says how an image passes the encoder (`PretrainMethod.passes`). Heads and losses are counted of the
contrastive methods with queues, and the head of masked image modelling; other methods' heads are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcmstr_fast import models, ops
from rcmstr_fast.config import PretrainConfig, num_frames
from rcmstr_fast.methods.levels import RelationalSettings, used_levels
from rcmstr_fast.methods.parts.masking import MaskSettings
from rcmstr_fast.methods.parts.momentum import MomentumSettings
from rcmstr_fast.methods.permutation import pairing_windows
from rcmstr_fast.methods.protocol import Pass
from rcmstr_fast.methods.registry import find
from rcmstr_fast.models.transformer import Attention

#: Parts of a step, in the order of the tables.
PARTS = ("products", "norms", "masked pass", "reconstruction", "projector", "features", "loss", "update")
#: Images whose masks give the visible share.
_MASKS = 64


@dataclass(frozen=True)
class Work:
    """One pass over some data.

    Attributes:
        part: of a training step, one of `PARTS`.
        flop: floating-point operations.
        bytes: read and written in device memory.
    """

    part: str
    flop: float
    bytes: float


@dataclass(frozen=True)
class Product:
    """A layer that multiplies by a weight, applied to one image.

    Attributes:
        flop: of the forward pass.
        inputs: elements read.
        outputs: elements written.
        weights: elements of the weight.
        shape: of the input, without the batch.
        share: of the work that is left at the visible sites (1 where everything is visible).
        first: its input needs no gradient.
    """

    flop: float
    inputs: float
    outputs: float
    weights: float
    shape: tuple[int, ...] = ()
    share: float = 1.0
    first: bool = False

    def works(self, part: str, images: int, size: int, training: bool) -> Iterator[Work]:
        """Forward and, where `training`, both gradients; `size` bytes an element."""
        n = images * self.share
        one = n * self.flop
        moved = size * (n * (self.inputs + self.outputs) + self.weights)
        yield Work(part, one, moved)
        if training:
            if not self.first:
                yield Work(part, one, moved)
            yield Work(part, one, moved + (4 - size) * self.weights)


def encoder_products(config: PretrainConfig) -> list[tuple[Product, nn.Module]]:
    """Every product of the encoder's dense pass, in the order of execution, with its module."""
    with torch.device("meta"):
        encoder = models.build_encoder(config.model).eval()
        images = torch.empty(1, 3, config.model.height, config.model.image_width)
        return _products(encoder, images)


def _products(module: nn.Module, x: Tensor) -> list[tuple[Product, nn.Module]]:
    found: list[tuple[Product, nn.Module]] = []

    def seen(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        taken, made = inputs[0].numel(), output.numel()
        if isinstance(layer, Attention):  # scores and weighted sum, kept on chip
            batch, n, dim = inputs[0].shape
            found.append((Product(4.0 * batch * n * n * dim, 3.0 * taken, made, 0, (n, dim)), layer))
            return
        kernel = cast(Tensor, layer.weight)
        weight = kernel.numel()
        flop = 2.0 * weight * made / kernel.shape[0]
        shape = tuple(inputs[0].shape[1:])
        found.append((Product(flop, taken, made, weight, shape, first=not found), layer))

    kinds = (nn.Conv2d, nn.Conv1d, nn.Linear, Attention)
    handles = [m.register_forward_hook(seen) for m in module.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            module(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def pass_products(config: PretrainConfig, one: Pass) -> list[Product]:
    """The products of a pass through the encoder; `share` says how much of each is computed.

    Of a ViT the given share of the tokens counts, and its square in attention. Of a CNN's masked pass only pairs of a
    visible output and a visible input count.
    """
    products = encoder_products(config)
    if config.model.encoder.startswith("vit"):
        return [_shared(x, one.share ** (2 if isinstance(layer, Attention) else 1)) for x, layer in products]
    if one.hidden is None:
        return [_shared(product, one.share) for product, _ in products]
    size = (config.model.height, config.model.image_width)
    masks = ops.draw_masks(
        torch.arange(_MASKS),
        seed=config.seed,
        epoch=0,
        size=size,
        unit=one.hidden.unit,
        mask_ratio=one.hidden.ratio,
        num_blocks=one.hidden.blocks,
        backend="reference",
    )
    encoder = models.ResNet29(0.25)
    sites = ops.active_sites(masks.grid, encoder.stage_sizes(*size), one.hidden.rule, backend="reference")
    counts = [sum(isinstance(m, nn.Conv2d) for m in stage.modules()) for stage in encoder.stages]
    stages = [i for i, count in enumerate(counts) for _ in range(count)]
    found = []
    for (product, conv), stage in zip(products, stages, strict=True):
        before = stage - (conv.kernel_size == (2, 2))  # these two change the size without a pool
        share = _visible_pairs(sites[before].active.float(), sites[stage].active.float(), cast(nn.Conv2d, conv))
        found.append(_shared(product, share))
    return found


def _shared(product: Product, share: float) -> Product:
    return replace(product, share=share)


def _visible_pairs(inputs: Tensor, outputs: Tensor, conv: nn.Conv2d) -> float:
    """Share of a convolution's multiplications whose input and output are both visible."""
    taps, padding = torch.ones(1, 1, *conv.kernel_size), cast(tuple[int, int], conv.padding)

    def pairs(x: Tensor, y: Tensor) -> Tensor:
        return (F.conv2d(x, taps, stride=conv.stride, padding=padding) * y).sum()

    return float(pairs(inputs, outputs) / pairs(torch.ones_like(inputs), torch.ones_like(outputs)))


def step_works(config: PretrainConfig, images: int, precision: str) -> list[Work]:
    """All the work of a step.

    Args:
        config: resolved.
        images: of this process.
        precision: bf16 or fp32.
    """
    size = 2 if precision == "bf16" else 4
    works: list[Work] = []
    passes = encoder_passes(config)
    for one in passes:
        part = "products" if one.hidden is None else "masked pass"
        products = pass_products(config, one)
        for product in products:
            works += product.works(part, images, size, one.trained)
        # Norm, activation, residual: forward reads and writes a map, backward reads it and its gradient, writes one.
        moved = size * images * between_products(config, products) * (5 if one.trained else 2)
        works.append(Work("norms" if one.hidden is None else part, 0.0, moved))
    if isinstance(config.method, MaskSettings):
        works += _head(config, images, size)
    if isinstance(config.method, RelationalSettings):
        works += _rows(config, images, size, 1 + bool(config.method.permute))
        works += _losses(config, images, size)
    works.append(_update(config))
    return works


def encoder_passes(config: PretrainConfig) -> tuple[Pass, ...]:
    """How an image goes through the encoder in a step."""
    return find(config.method.name).method.passes(config)


def between_products(config: PretrainConfig, products: list[Product]) -> float:
    """Elements of one image that a norm or an activation between products takes."""
    if not config.model.encoder.startswith("vit"):
        return sum(product.outputs * product.share for product in products)
    tokens = config.model.height * config.model.image_width // 16
    norms = 6 * config.model.depth + 1  # two norms and the MLP's activation a block
    return products[0].share * tokens * encoder_width(config) * norms


def _head(config: PretrainConfig, images: int, size: int) -> Iterator[Work]:
    """The reconstruction head: products of its linear layers, and the pictures of the loss."""
    model, dim = config.model, encoder_width(config)
    pixels = 3 * model.height * model.image_width
    if model.encoder.startswith("vit"):
        tokens = pixels // 48
        layers = [(tokens, dim, 192), (tokens, 192, 192), (tokens, 192, 48)]
    else:
        frames = num_frames(model)
        layers = [(frames, dim, dim), (frames, 7, dim), (frames, dim, 4 * dim), (frames, 4 * dim, dim)]
        layers.append((model.image_width // 4, dim, 12 * model.height))
    for rows, n_in, n_out in layers:
        yield from Product(2.0 * rows * n_in * n_out, rows * n_in, rows * n_out, n_in * n_out).works(
            "reconstruction", images, size, True
        )
    yield Work("reconstruction", 0.0, images * pixels * (4 * size))


def encoder_width(config: PretrainConfig) -> int:
    """Channels of the encoder's frames."""
    with torch.device("meta"):
        return models.build_encoder(config.model).out_channels


def _rows(config: PretrainConfig, images: int, size: int, trained: int) -> Iterator[Work]:
    """Projector and predictors: matrix products over frames, subwords and words."""
    model, frames, method = config.model, num_frames(config.model), cast(RelationalSettings, config.method)
    hidden, dim, channels = model.projector_hidden, model.feature_dim, encoder_width(config)
    if model.encoder.startswith("vit"):
        projector = [(channels, hidden), (hidden, hidden), (hidden, dim)]
        predictor = [(dim, hidden), (hidden, hidden), (hidden, dim)]
    else:
        projector = [pair for n in (channels, hidden) for pair in ((n + hidden, 8 * hidden), (2 * hidden, hidden))]
        predictor = [(hidden, dim)]
    counts = {"frame": frames, "subword": method.num_subwords, "word": 1}
    layers = [("projector", frames, *pair) for pair in projector]
    layers += [("features", counts[level], *pair) for level in used_levels(method) for pair in predictor]
    for part, rows, n_in, n_out in layers:
        product = Product(2.0 * rows * n_in * n_out, rows * n_in, rows * n_out, n_in * n_out)
        for _ in range(trained):
            yield from product.works(part, images, size, True)
        yield from product.works(part, images, size, False)


def _losses(config: PretrainConfig, images: int, size: int) -> Iterator[Work]:
    """Queue losses: each row against the queue once, and once more for the gradient of each query."""
    method, dim = cast(RelationalSettings, config.method), config.model.feature_dim
    counts = {"frame": num_frames(config.model), "subword": method.num_subwords, "word": 1}
    queries = 1 + bool(method.permute)
    terms = [counts[level] * (2 * queries + bool(method.kl)) for level in method.levels or ()]
    if method.inter in ("f2s", "both"):
        windows = pairing_windows(counts["frame"], method.num_subwords, method.inter_pairing)
        low = len({t for start, end in windows for t in range(start, end)})
        terms.append(2 * low + counts["subword"])
    if method.inter in ("s2w", "both"):
        terms.append(2 * counts["subword"] + 1)
    for rows in terms:
        read = size * dim * (method.queue_size + images * rows)
        yield Work("loss", 2.0 * images * rows * method.queue_size * dim, read)


def parameters(config: PretrainConfig) -> tuple[int, int]:
    """Numbers of the weights: those that are trained, and those of them that a momentum network follows."""
    method = config.method
    with torch.device("meta"):
        encoder = models.build_encoder(config.model)
        network: list[nn.Module] = [encoder]
        if isinstance(method, RelationalSettings):
            network.append(models.build_projector(config.model, encoder.out_channels))
            network += [models.build_predictor(config.model) for _ in used_levels(method)]
        head = [models.build_mim_head(config.model, encoder)] if isinstance(method, MaskSettings) else []
    shared, alone = (sum(p.numel() for m in part for p in m.parameters()) for part in (network, head))
    return shared + alone, shared if isinstance(method, MomentumSettings) else 0


def _update(config: PretrainConfig) -> Work:
    """Optimiser and momentum network: every number of their state read and written once."""
    trained, followed = parameters(config)
    own = 28 if config.optim.name == "adamw" else 20  # AdamW: weight, gradient, two moments in; weight, moments out
    return Work("update", 0.0, own * trained + 8 * followed)
