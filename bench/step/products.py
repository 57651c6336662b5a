"""Times of the bare convolutions and linear layers of an encoder: forward, data gradient, weight gradient."""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rcmstr_fast import timer
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.measure.records import Row
from rcmstr_fast.methods.costs import encoder_products

DIRECTIONS = ("forward", "data gradient", "weight gradient")


def layers(config: PretrainConfig) -> dict[tuple, tuple[int, float]]:
    """Distinct layers of the encoder: (input, weight, stride, padding) -> how often it occurs, operations an image."""
    flops: dict[tuple, float] = {}
    counts: Counter[tuple] = Counter()
    for product, layer in encoder_products(config):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            extra = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else (None, None)
            key = (product.shape, tuple(layer.weight.shape), *extra)
            counts[key] += 1
            flops[key] = product.flop
    return {key: (count, flops[key]) for key, count in counts.items()}


def calls(layer: tuple, images: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Direction -> one call of a layer of `layers` on random data."""
    shape, weight, stride, padding = layer
    x = torch.randn(images, *shape, device=device).to(dtype)
    w = (torch.randn(weight, device=device) * 0.05).to(dtype)
    if stride is None:
        rows = x.flatten(0, 1)
        gradient = torch.randn(len(rows), weight[0], device=device).to(dtype)
        made = (lambda: F.linear(rows, w), lambda: gradient @ w, lambda: gradient.T @ rows)
        return dict(zip(DIRECTIONS, made, strict=True))
    x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    gradient = torch.randn_like(F.conv2d(x, w, stride=stride, padding=padding))

    def backward(*wanted: bool) -> Any:
        return torch.ops.aten.convolution_backward(
            gradient, x, w, None, stride, padding, (1, 1), False, (0, 0), 1, (*wanted, False)
        )

    made = (
        lambda: F.conv2d(x, w, stride=stride, padding=padding),
        lambda: backward(True, False),
        lambda: backward(False, True),
    )
    return dict(zip(DIRECTIONS, made, strict=True))


def rows(config: PretrainConfig, images: int, precision: str, device: str, repetitions: int) -> list[Row]:
    """One row a distinct layer and direction: ms, TFLOP, TFLOP/s, and how often it occurs in the encoder.

    Args:
        config: resolved.
        images: batch of one pass.
        precision: bf16 or fp32.
        device: cuda or cpu.
        repetitions: timed calls.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = []
    # cuDNN measures its algorithms for every shape, as the trainer lets it.
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    for layer, (count, flop) in layers(config).items():
        kernel = "linear" if layer[2] is None else f"{layer[1][2]}x{layer[1][3]} stride {layer[2]}"
        name = f"{'x'.join(map(str, layer[0]))} -> {layer[1][0]}, {kernel}"
        for direction, run in calls(layer, images, dtype, device).items():
            times = timer.measure(run, torch.device(device), rounds=repetitions, cold=True)
            found.append(
                {
                    "layer": name,
                    "direction": direction,
                    "count": count,
                    "encoder": config.model.encoder,
                    "images": images,
                    "precision": precision,
                    "status": "ok",
                    "tflop": flop * images / 1e12,
                    "tflop_per_s": flop * images / times.median / 1e9,
                    **times.row(),
                }
            )
    torch.backends.cudnn.benchmark = before
    return found


def step_ms(found: list[Row], trained: int) -> float:
    """Time of all products of a step from `rows`: `trained` passes with both gradients, and the key's forward pass.

    The first layer's data gradient, which a step does not need, is left out.
    """
    times = {d: [row["ms"] * row["count"] for row in found if row["direction"] == d] for d in DIRECTIONS}
    forward, data, weight = (sum(times[d]) for d in DIRECTIONS)
    return trained * (forward + data - times["data gradient"][0] + weight) + forward
