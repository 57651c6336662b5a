"""Times of candidate tiles on the GPU at hand, from which the tile tables of the kernels are chosen.

Queue losses: both passes of a level at the training size. Masked convolution: forward with statistics, and the
backward pass with and without the input's gradient, at the two shapes where a ResNet spends its time, beside cuDNN's
dense convolution and the making of the site lists; everything as a recorded graph, timed by events.

A candidate whose results differ from those of the shipped tile is reported as FAIL and not timed; one that does not
fit says so. A winner goes into a table only if bench.aot finds neither stack nor spills.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.setting import Rows, Setting
from bench.ops.masked import masks_of
from bench.ops.queue_losses import ALPHA, TAU_INFO, TAU_KL, unit
from rcmstr_fast import ops, timer
from rcmstr_fast.kernels import runtime
from rcmstr_fast.kernels.masked import conv
from rcmstr_fast.kernels.masked.tiles import ConvTile
from rcmstr_fast.kernels.queue_losses import tiles
from rcmstr_fast.kernels.queue_losses.problem import level_problem
from rcmstr_fast.kernels.queue_losses.tiles import Tile
from rcmstr_fast.ops import triton_backend

STAGES = (2, 3, 4)
SHAPES = ((64, 32, 4), (64, 64, 4), (64, 64, 8), (64, 128, 4), (128, 32, 8), (128, 64, 8), (128, 128, 8))
#: (rows, channels, step, warps, stages) of candidates for the masked convolution
CONV_TILES = (
    (128, 128, 64, 8, 3),
    (128, 128, 64, 4, 3),
    (128, 128, 32, 8, 4),
    (128, 256, 64, 8, 3),
    (64, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (64, 128, 64, 4, 4),
    (128, 64, 64, 4, 4),
)
#: Largest relative difference from the shipped tile.
_SAME = {torch.float16: 1e-3, torch.bfloat16: 2e-2, torch.float32: 1e-3}


@contextmanager
def replaced(module: ModuleType, name: str, tile: Any) -> Iterator[None]:
    """While entered, the function `name` of a module returns `tile` for every shape."""
    original = getattr(module, name)
    setattr(module, name, lambda *_: tile)
    try:
        yield
    finally:
        setattr(module, name, original)


def tried(run: Callable[[], Tensor], expected: Tensor, device: torch.device, rounds: int, *, graph: bool) -> dict:
    """Check one candidate against what the shipped tile gives, then time it."""
    try:
        error = float((run().double() - expected.double()).norm() / expected.double().norm())
        if not error < _SAME[expected.dtype]:
            return {"status": "FAIL", "error": error}
        timed = timer.captured(run)[0] if graph and device.type == "cuda" else run
        return {"status": "ok", **timer.measure(timed, device, rounds=rounds, cold=True).row()}
    except Exception as error:  # a tile that does not fit is a result
        return {"status": f"{type(error).__name__}: {str(error)[:100]}"}


def loss_candidates(width: int) -> list[Tile]:
    """Every shape x stages x queries a program that is worth a try at a width."""
    queries = (1, 2) if width <= 128 else (1,)
    return [
        Tile(m, n, warps, stages, q, resident=resident)
        for (m, n, warps), stages, q, resident in itertools.product(SHAPES, STAGES, queries, (1, 2))
        if not (resident == 2 and warps == 8)
    ]


def losses(setting: Setting, width: int = 128) -> Rows:
    """Tiles of both passes of a level's queue loss; it needs a GPU even for small sizes."""
    if setting.device == "cpu":
        return [{"status": "not run", "reason": "the tiles of the losses need a CUDA GPU"}]
    device, count, keys = setting.torch_device, setting.choose(13312, 64), setting.choose(65536, 256)
    query, permuted, key, queue = (unit(n, width, i, "cuda") for i, n in enumerate((count, count, count, keys)))
    problem = level_problem([query, permuted], key, queue, TAU_INFO, TAU_KL, ALPHA)
    _, _, coefficients = problem.row_terms(problem.launch("stats"))
    rows: Rows = []
    for kind, extra in (("stats", ()), ("gradient", (coefficients,))):
        shipped = tiles.tile(kind, runtime.architecture(device), width, 2)
        expected = problem.launch(kind, extra).sum(0)
        for tile in [shipped, *loss_candidates(width)]:
            head = {"what": "loss tile", "kind": kind, "tile": vars(tile), "shipped": tile == shipped}
            with replaced(tiles, "tile", tile):
                found = tried(lambda k=kind, e=extra: problem.launch(k, e).sum(0), expected, device, 20, graph=False)
            rows.append(head | found)
            setting.keep(rows)
    return rows


@dataclass(frozen=True)
class ConvShape:
    """A 3x3 convolution of the masked pass.

    Attributes:
        size: height and width of the maps.
        channels: of input and output.
        batch: images.
        dtype: of the maps.
        ratio: share of hidden cells.
    """

    size: tuple[int, int]
    channels: int
    batch: int
    dtype: torch.dtype
    ratio: float = 0.7

    @property
    def name(self) -> str:
        """For the rows."""
        return f"{self.size[0]}x{self.size[1]}x{self.channels} B={self.batch}"


def conv_shapes(setting: Setting) -> list[ConvShape]:
    """The two shapes where a ResNet spends its time, or a tiny one."""
    full = [ConvShape((4, 26), 512, 512, torch.bfloat16), ConvShape((8, 25), 256, 512, torch.bfloat16)]
    return setting.choose(full, [ConvShape((8, 25), 16, 1, torch.float32)])


class MaskedConv:
    """The masked convolution with its norm at a shape, its dense counterpart, and the making of its lists."""

    def __init__(self, shape: ConvShape, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.shape, self.device = shape, device
        masks = masks_of(shape.batch, shape.ratio, device.type)
        self.stage = ops.active_sites(masks.grid, [shape.size], backend="reference")[0]._replace(source=None)
        sizes = ((shape.batch, shape.channels, *shape.size), (shape.channels, shape.channels, 3, 3))
        x, weight = (torch.randn(n, generator=generator, device=device).to(shape.dtype) for n in sizes)
        self.x = x.to(memory_format=torch.channels_last)
        self.weight = (weight / (3 * shape.channels**0.5)).to(memory_format=torch.channels_last)
        self.scale, self.shift = torch.ones(shape.channels, device=device), torch.zeros(shape.channels, device=device)
        self.sites = self.lists()

    def lists(self) -> Any:
        """The stage as the kernels take it, with the lists of the 3x3 window."""
        window = ((3, 3), (1, 1), (1, 1))
        return ops.masked_storage([self.stage], windows=[[window]], backend="triton")[0]

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolution and norm, zero where inactive."""
        y = ops.masked_conv_norm(x, weight, self.sites, self.scale, self.shift, padding=1, relu=True, backend="triton")
        return ops.unpack_sites(y, self.sites)

    def pass_of(self, kind: str) -> Tensor:
        """One pass: forward, weight (forward and the weight's gradient), or both gradients; its last result."""
        if kind == "forward":
            with torch.no_grad():
                return self.forward(self.x, self.weight)
        x = self.x.detach().requires_grad_(kind == "both")
        weight = self.weight.detach().requires_grad_()
        loss = self.forward(x, weight).float().square().sum()
        if kind == "weight":
            return torch.autograd.grad(loss, [weight])[0]
        gradient = torch.autograd.grad(loss, [weight, x])[1]
        return torch.where(self.stage.active, gradient, torch.zeros_like(gradient))  # elsewhere it holds anything

    def dense(self, kind: str) -> Tensor:
        """cuDNN's convolution of the whole map: forward, or one of its gradients."""
        y = torch.ones_like(self.x)
        if kind == "forward":
            return F.conv2d(self.x, self.weight, padding=1)
        wanted = (kind == "data", kind == "weight", False)
        made = torch.ops.aten.convolution_backward(
            y, self.x, self.weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, wanted
        )
        return made[1 - int(wanted[0])]


def convolutions(setting: Setting) -> Rows:
    """The masked convolution at the shapes of `conv_shapes`: lists, cuDNN, the shipped tiles, and every candidate."""
    if setting.device == "cpu" and not triton_backend.interpreted():
        return [{"status": "not run", "reason": "Triton runs on a CPU with TRITON_INTERPRET=1 only"}]
    rows: Rows = []
    candidates = setting.choose(CONV_TILES, ((32, 16, 16, 4, 2),))
    device, rounds = setting.torch_device, setting.choose(20, 1)
    for shape in conv_shapes(setting):
        masked = MaskedConv(shape, device)
        runs: dict[tuple[str, str], Callable[[], Any]] = {("lists", "sites"): masked.lists}
        runs |= {("cuDNN", kind): partial(masked.dense, kind) for kind in ("forward", "data", "weight")}
        for (way, kind), run in runs.items():
            timed = timer.captured(run)[0] if device.type == "cuda" else run
            times = timer.measure(timed, device, rounds=rounds, cold=True)
            rows.append({"what": "masked convolution", "shape": shape.name, "way": way, "pass": kind, **times.row()})
        for kind, function in (("forward", "tile"), ("weight", "weight_tile"), ("both", "tile")):
            expected = masked.pass_of(kind)
            head = {"what": "conv tile", "shape": shape.name, "pass": kind}
            found = tried(partial(masked.pass_of, kind), expected, device, rounds, graph=True)
            rows.append(head | {"shipped": True} | found)
            for values in candidates:
                tile = ConvTile(*values)
                with replaced(conv, function, tile):
                    found = tried(partial(masked.pass_of, kind), expected, device, rounds, graph=True)
                rows.append(head | {"shipped": False, "tile": vars(tile)} | found)
            setting.keep(rows)
    return rows
