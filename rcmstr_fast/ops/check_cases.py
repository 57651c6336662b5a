"""Small inputs that are hard on a kernel: odd sizes, several tiles and a partial one, a single row, hidden NaN.

A case draws its tensors in float64 and calls a public operation on a named backend. `selfcheck` runs every compiled
backend over them on the user's machine, and the tests do the same on theirs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rcmstr_fast import ops

Tensors = dict[str, Tensor]

#: Largest error relative to the largest expected magnitude, by dtype of the arithmetic's operands.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

_BOTH = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        name: in a few words.
        make: draws the arguments: floating point in float64, on the CPU.
        call: (arguments, backend) -> the tensors of the result.
        leaves: arguments that receive a gradient.
        dtypes: that it runs in.
        device: the only type of device that it runs on (where another one has nothing to show, or takes minutes); empty:
            on any.
        half: backends that take float16 operands whatever the dtype.
        outliers: share of a result's elements that may differ at all (a threshold may fall either way).
        tolerance: instead of that of the dtype.
        floor: magnitude to which errors are relative at least.
    """

    name: str
    make: Callable[[], Tensors]
    call: Callable[[Tensors, str], list[Tensor]]
    leaves: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    device: str = ""
    half: tuple[str, ...] = ()
    outliers: float = 0.0
    tolerance: float | None = None
    floor: float = 1e-12


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, drawn in float64 on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_rows(count: int, width: int, seed: int) -> Tensor:
    """Random rows of length 1."""
    return F.normalize(normal(count, width, seed=seed), dim=1)


def chosen(*shape: int, seed: int, share: float) -> Tensor:
    """Random bools, True with the probability `share`."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def orders(batch: int, count: int) -> Tensor:
    """A random order [batch, count] int64 of the strips of all images."""
    return torch.randperm(batch * count, generator=torch.Generator().manual_seed(batch)).view(batch, count)


def _losses() -> list[Case]:
    def make(rows: int, keys: int, width: int, equal: bool = False) -> Callable[[], Tensors]:
        def draw() -> Tensors:
            queue = unit_rows(1, width, 4).repeat(keys, 1) if equal else unit_rows(keys, width, 4)
            return {
                "query": unit_rows(rows, width, 1),
                "permuted": unit_rows(rows, width, 2),
                "key": unit_rows(rows, width, 3),
                "queue": queue,
                "query_rows": torch.arange(2 * rows) // 2,
                "key_rows": torch.arange(2 * rows) % rows,
            }

        return draw

    def call(x: Tensors, backend: str) -> list[Tensor]:
        # The temperatures are high so that rounding operands to float16 is far below one percent of a row.
        terms = [
            ops.LossTerm(x["query"], x["key"], x["queue"], x["permuted"], 0.5),
            ops.LossTerm(x["query"], x["key"], x["queue"], None, 1.0, True, x["query_rows"], x["key_rows"]),
        ]
        found = ops.relational_losses(terms, tau_info=0.7, tau_kl=0.4, backend=backend)
        return [result.loss for result in found]

    leaves, half = ("query", "permuted"), ("triton",)
    return [
        # Few enough similarities that the elementwise work of plain PyTorch stays in one thread: on a busy CPU, threads
        # that wait for each other take a hundred times as long as the work.
        Case("rows 131, keys 109, D 128", make(131, 109, 128), call, leaves, half=half),
        # Whatever the number of multiprocessors, programs go through several steps: loads run ahead, buffers come round.
        Case("rows 131, keys 16411, D 128", make(131, 16411, 128), call, leaves, device="cuda", half=half),
        Case("one row, one key, D 64", make(1, 1, 64), call, leaves, half=half),
        Case("a queue of equal rows", make(5, 70, 64, equal=True), call, leaves, half=half, floor=0.01),
    ]


def _in_batch() -> list[Case]:
    def make(rows: int, others: int) -> Callable[[], Tensors]:
        return lambda: {
            "query": unit_rows(rows, 64, 1),
            "candidates": unit_rows(others, 64, 2),
            "positive": torch.arange(rows) % others,
            "skip": (torch.arange(rows) + 1) % others,
        }

    def call(x: Tensors, backend: str) -> list[Tensor]:
        positive, skip = x["positive"], x["skip"]
        return [
            ops.info_nce(x["query"], x["candidates"], positive, temperature=0.5, skip=skip, backend=backend),
            ops.info_nce(x["query"], x["candidates"], positive, temperature=0.5, backend=backend),
        ]

    leaves, half = ("query", "candidates"), ("triton",)
    return [
        Case("rows 67, candidates 333", make(67, 333), call, leaves, half=half),
        Case("one row", make(1, 3), call, leaves, half=half),
    ]


def _batch_norm() -> list[Case]:
    def make(*shape: int) -> Callable[[], Tensors]:
        def draw() -> Tensors:
            x, residual = 3 + 2 * normal(*shape, seed=1), normal(*shape, seed=2)
            if len(shape) == 4:
                x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
            channels = shape[1] if len(shape) == 4 else shape[-1]
            return {
                "x": x,
                "residual": residual,
                "weight:": normal(channels, seed=3),
                "bias:": normal(channels, seed=4),
            }

        return draw

    def call(relu: bool) -> Callable[[Tensors, str], list[Tensor]]:
        def run(x: Tensors, backend: str) -> list[Tensor]:
            given = (x["x"], x["weight:"], x["bias:"])
            options: dict[str, Any] = {"group_size": 3, "residual": x["residual"], "relu": relu}
            return list(ops.grouped_batch_norm(*given, **options, backend=backend))

        return run

    leaves = ("x", "residual", "weight:", "bias:")
    return [
        Case("maps [7, 70, 3, 5]", make(7, 70, 3, 5), call(True), leaves),
        Case("maps [7, 70, 3, 5], linear", make(7, 70, 3, 5), call(False), leaves, dtypes=_BOTH),
        Case("rows [5, 1, 9]", make(5, 1, 9), call(True), leaves),
    ]


def _sites(x: Tensors) -> ops.Sites:
    return ops.Sites(x["active"], x["source"])


def _masked_inputs(batch: int, inputs: int, outputs: int, size: tuple[int, int]) -> Callable[[], Tensors]:
    def draw() -> Tensors:
        active = chosen(batch, 1, *size, seed=1, share=0.4)
        active[0, 0, 0, 0] = True
        x = torch.where(active, normal(batch, inputs, *size, seed=2), torch.nan)
        return {
            "x": x,
            "active": active,
            "source": active.clone(),
            "weight": normal(outputs, inputs, 3, 3, seed=3),
            "scale:": normal(outputs, seed=4),
            "shift:": normal(outputs, seed=5),
            "input_scale:": normal(inputs, seed=6),
            "input_shift:": normal(inputs, seed=7),
        }

    return draw


def _masked_conv() -> list[Case]:
    def call(x: Tensors, backend: str) -> list[Tensor]:
        return [ops.masked_conv2d(x["x"], x["weight"], _sites(x), padding=1, backend=backend)]

    return [
        Case("[5, 9, 8, 13] to 70", _masked_inputs(5, 9, 70, (8, 13)), call, ("x", "weight"), dtypes=_BOTH),
        Case("[4, 33, 8, 13] to 5", _masked_inputs(4, 33, 5, (8, 13)), call, ("x", "weight"), dtypes=_BOTH),
        Case("one site", _masked_inputs(1, 17, 3, (1, 1)), call, ("x", "weight")),
    ]


def _masked_conv_norm() -> list[Case]:
    def call(relu: bool) -> Callable[[Tensors, str], list[Tensor]]:
        def run(x: Tensors, backend: str) -> list[Tensor]:
            given = (x["x"], x["weight"], _sites(x), x["scale:"], x["shift:"])
            return [ops.masked_conv_norm(*given, padding=1, relu=relu, backend=backend)]

        return run

    leaves = ("x", "weight", "scale:", "shift:")
    made, wide = _masked_inputs(5, 9, 70, (8, 13)), _masked_inputs(5, 256, 256, (8, 13))
    return [
        Case("[5, 9, 8, 13] to 70", made, call(True), leaves),
        Case("[5, 9, 8, 13] to 70, linear", made, call(False), leaves, dtypes=_BOTH),
        # The tiles of wide layers, which divide the channels evenly.
        Case("[5, 256, 8, 13] to 256", wide, call(True), leaves, dtypes=(torch.bfloat16,), device="cuda"),
    ]


def _masked_batch_norm() -> list[Case]:
    def call(x: Tensors, backend: str) -> list[Tensor]:
        given = (x["x"], x["input_scale:"], x["input_shift:"], _sites(x))
        return [ops.masked_batch_norm(*given, group_size=2, backend=backend)]

    made = _masked_inputs(5, 70, 1, (8, 13))
    return [Case("[5, 70, 8, 13]", made, call, ("x", "input_scale:", "input_shift:"), dtypes=_BOTH)]


def _masked_pool() -> list[Case]:
    def make() -> Tensors:
        source = chosen(5, 1, 8, 14, seed=1, share=0.4)
        x = torch.where(source, normal(5, 70, 8, 14, seed=2), torch.nan)
        return {"x": x, "source": source, "active": F.max_pool2d(source.double(), 2).bool()}

    def call(x: Tensors, backend: str) -> list[Tensor]:
        return [ops.masked_max_pool2d(x["x"], _sites(x), kernel_size=2, stride=2, backend=backend)]

    return [Case("[5, 70, 8, 14]", make, call, ("x",))]


def _pixels() -> list[Case]:
    def make() -> Tensors:
        mask = chosen(3, 1, 8, 52, seed=3, share=0.7)
        prediction = torch.where(mask, normal(3, 3, 8, 52, seed=1), torch.nan)
        return {"prediction": prediction, "target": normal(3, 3, 8, 52, seed=2), "mask": mask}

    def call(x: Tensors, backend: str) -> list[Tensor]:
        return [ops.masked_mse(x["prediction"], x["target"], x["mask"], backend=backend)]

    return [Case("[3, 3, 8, 52]", make, call, ("prediction",))]


def _tokens() -> list[Case]:
    def make() -> Tensors:
        hidden = chosen(3, 17, seed=4, share=0.6)
        tokens = torch.where(hidden[..., None], torch.nan, normal(3, 17, 20, seed=1))
        return {"tokens": tokens, "token": normal(20, seed=2), "position": normal(17, 20, seed=3), "hidden": hidden}

    def call(x: Tensors, backend: str) -> list[Tensor]:
        return [ops.replace_tokens(x["tokens"], x["token"], x["position"], x["hidden"], backend=backend)]

    return [Case("[3, 17, 20]", make, call, ("tokens", "token"))]


def _levels() -> list[Case]:
    def pool(x: Tensors, backend: str) -> list[Tensor]:
        return list(ops.hierarchical_pool(x["frames"], 4, order=x["order"], backend=backend))

    return [
        Case("[3, 26, 20]", lambda: {"frames": normal(3, 26, 20, seed=1), "order": orders(3, 13)}, pool, ("frames",))
    ]


def _projections() -> list[Case]:
    names = ("frame", "subword", "word")

    def make() -> Tensors:
        weights = {name: normal(64, 64, seed=i) / 8 for i, name in enumerate(names)}
        biases = {f"{name} bias": normal(64, seed=9 + i) for i, name in enumerate(names)}
        return {"frames": normal(3, 26, 64, seed=20), "order": orders(3, 13), **weights, **biases}

    def call(x: Tensors, backend: str) -> list[Tensor]:
        weights, biases = {n: x[n] for n in names}, {n: x[f"{n} bias"] for n in names}
        return [*ops.project_levels(x["frames"], weights, biases, 4, order=x["order"], backend=backend).values()]

    leaves = ("frames", *names, *(f"{name} bias" for name in names))
    return [Case("[3, 26, 64]", make, call, leaves, half=("triton",))]


def _masks() -> list[Case]:
    def call(x: Tensors, backend: str) -> list[Tensor]:
        found = [
            ops.draw_masks(
                x["index"], seed=7, epoch=2, size=(32, 100), unit=unit, mask_ratio=0.7, num_blocks=1, backend=backend
            )
            for unit in ("token", "column")
        ]
        return [tensor for masks in found for tensor in (masks.grid, masks.pixels)]

    return [Case("5 images", lambda: {"index": torch.arange(5) + (1 << 33)}, call)]


def _queue() -> list[Case]:
    def make() -> Tensors:
        return {"queue": unit_rows(71, 20, 1), "keys": unit_rows(66, 20, 2), "pointer": torch.tensor(37)}

    def call(x: Tensors, backend: str) -> list[Tensor]:
        queue, pointer = x["queue"].clone(), x["pointer"].clone()
        ops.enqueue_(queue, pointer, x["keys"], backend=backend)
        return [queue, pointer]

    return [Case("66 keys into 71 rows", make, call)]


def _views() -> list[Case]:
    def make() -> Tensors:
        small = torch.rand(3, 3, 6, 14, generator=torch.Generator().manual_seed(1))
        images = F.interpolate(small, (32, 100), mode="bicubic").clamp(0, 1) * 255
        return {"images": images.permute(0, 2, 3, 1).contiguous().to(torch.uint8), "index": torch.arange(3) + (1 << 33)}

    def call(x: Tensors, backend: str) -> list[Tensor]:
        options: dict[str, Any] = {"seed": 11, "epoch": 2, "num_views": 2, "size": (32, 100)}
        return [ops.augment_views(x["images"], index=x["index"], **options, backend=backend)]

    # A twentieth of a grey level; a pixel at the threshold of solarise may fall on either side.
    return [Case("3 images, 2 views", make, call, outliers=1e-3, tolerance=0.05 * 2 / 255)]


#: Operation -> its cases.
CASES: Mapping[str, Callable[[], list[Case]]] = {
    "relational_losses": _losses,
    "info_nce": _in_batch,
    "grouped_batch_norm": _batch_norm,
    "masked_conv2d": _masked_conv,
    "masked_conv_norm": _masked_conv_norm,
    "masked_batch_norm": _masked_batch_norm,
    "masked_max_pool2d": _masked_pool,
    "masked_mse": _pixels,
    "replace_tokens": _tokens,
    "hierarchical_pool": _levels,
    "project_levels": _projections,
    "draw_masks": _masks,
    "enqueue_": _queue,
    "augment_views": _views,
}
