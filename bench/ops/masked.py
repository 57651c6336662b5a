"""Entries of the masked pass: a residual block of each stage, and the whole ResNet-29, sparse against dense x mask.

Forward and backward with batch norm, mask unit stage3; channels_last and one copy of the weights in the dtype of
autocast, as in training. What `ops` keeps as the break-even of a stage should be what these entries show. The sparse
way must give the features of the dense one to the precision of the dtype. On a GPU each way is a recorded graph, so
that the GPU is timed and not the launching.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from bench.ops.entry import Entry, Provider
from rcmstr_fast import ops, timer
from rcmstr_fast.models.conv_norm import WorkingWeights
from rcmstr_fast.models.resnet import BasicBlock, ResNet29

#: Name of a stage -> height and width of its maps, and its channels at width 1; `all` is the whole encoder.
STAGES = {
    "32x100": ((32, 100), 64),
    "16x50": ((16, 50), 128),
    "8x25": ((8, 25), 256),
    "4x26": ((4, 26), 512),
    "all": ((32, 100), 512),
}
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.15}
#: device -> backend of the sparse way
SPARSE = {"cuda": "triton", "cpu": "cpp"}
#: One forward and backward with the backend in effect; the features.
Pass = Callable[[], Tensor]


def masks_of(batch: int, ratio: float, device: str) -> ops.Masks:
    """Masks of one batch at a mask ratio, without the block that pretraining adds."""
    index = torch.arange(batch, device=device)
    return ops.draw_masks(index, seed=0, epoch=0, size=(32, 100), unit="stage3", mask_ratio=ratio, num_blocks=0)


def trained_form(model: torch.nn.Module, dtype: torch.dtype, device: str) -> WorkingWeights:
    """Bring a model to the device as training does; the shared copies of its weights (none in float32)."""
    model.to(device, memory_format=torch.channels_last)
    weights = WorkingWeights(model, None if dtype == torch.float32 else dtype)
    weights.refresh()
    return weights


def block_pass(stage: str, channels: int, batch: int, ratio: float, dtype: torch.dtype, device: str) -> Pass:
    """One residual block at a stage, whose input is stored as the backend stores it."""
    torch.manual_seed(0)
    block, size = BasicBlock(channels, channels), STAGES[stage][0]
    weights = trained_form(block, dtype, device)
    sizes = [STAGES[name][0] for name in STAGES if name != "all"]
    sites = ops.active_sites(masks_of(batch, ratio, device).grid, sizes)[sizes.index(size)]._replace(source=None)
    images = torch.randn(batch, channels, *size, device=device).to(memory_format=torch.channels_last)

    def run() -> Tensor:
        (stored,) = ops.masked_storage([sites], backend=os.environ["RCMSTR_FAST_BACKEND"])
        # A block inside a stage gets what its storage gives: the conversion is not part of it.
        x = stored.take_in(images, None) if getattr(stored, "kept", False) else images
        x = x.detach().requires_grad_()
        with weights.shared():
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                y = block(x, stored)
            y.float().square().sum().backward()  # where inactive, y may hold anything: it reaches the loss alone
        return ops.unpack_sites(y.detach(), stored)

    return run


def whole_pass(width: float, batch: int, ratio: float, dtype: torch.dtype, device: str) -> Pass:
    """The encoder's masked pass, site lists included."""
    torch.manual_seed(0)
    model, masks = ResNet29(width), masks_of(batch, ratio, device)
    weights = trained_form(model, dtype, device)
    images = torch.randn(batch, 3, 32, 100, device=device).to(memory_format=torch.channels_last)

    def run() -> Tensor:
        with weights.shared():
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                features, _ = model.forward_masked(images, masks, "anchored")
            features.float().square().sum().backward()
        return features.detach()

    return run


def ordered(run: Pass, backend: str) -> Tensor:
    """Run with RCMSTR_FAST_BACKEND set."""
    before = os.environ.get("RCMSTR_FAST_BACKEND")
    os.environ["RCMSTR_FAST_BACKEND"] = backend
    try:
        return run()
    finally:
        if before is None:
            del os.environ["RCMSTR_FAST_BACKEND"]
        else:
            os.environ["RCMSTR_FAST_BACKEND"] = before


def _provider(run: Pass, backend: str, device: str) -> Provider:
    """The pass with a backend; on a GPU its graph from the second call on, whose features are those of the first."""
    kept: list[timer.Run] = []

    def call(gradient: bool) -> list[Tensor]:
        if device == "cpu":
            return [ordered(run, backend)]
        if not kept:
            features = ordered(run, backend)
            kept.append(timer.captured(lambda: ordered(run, backend))[0])
            return [features]
        kept[0]()
        return []

    return call


def masked_pass(stage: str, width: float, ratio: float, batch: int, dtype: torch.dtype, device: str) -> Entry:
    """A stage at a width multiplier and a share of hidden sites.

    Args:
        stage: of STAGES.
        width: multiplier of the channels.
        ratio: share of hidden cells.
        batch: images.
        dtype: float32, or bfloat16 by autocast.
        device: cuda or cpu.
    """
    channels = round(STAGES[stage][1] * width)
    if stage == "all":
        run = whole_pass(width, batch, ratio, dtype, device)
    else:
        run = block_pass(stage, channels, batch, ratio, dtype, device)
    name = str(dtype).removeprefix("torch.")
    about = {
        "stage": stage,
        "width": width,
        "channels": channels,
        "mask_ratio": ratio,
        "dtype": name,
        "batch": batch,
    }
    return Entry(
        "masked_pass",
        f"{stage} C={channels} B={batch} hidden {100 * ratio:.0f} % {name}",
        lambda: [ordered(run, "reference").double()],
        {"dense": _provider(run, "reference", device), "sparse": _provider(run, SPARSE[device], device)},
        limit=LIMITS[dtype],
        about=about,
    )
