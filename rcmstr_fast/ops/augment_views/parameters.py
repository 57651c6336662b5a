"""Rows of parameters: their layout, how a preset is told to compiled code, and how they are drawn (the reference).

Every number of a row is a function of fixed words of the random stream of (seed, epoch, index, view), so that a
preset which changes one range changes nothing else, and all numbers are drawn, whatever operations are chosen.
"""

from functools import lru_cache

import torch
from torch import Tensor

from rcmstr_fast import random
from rcmstr_fast.ops.augment_views.presets import OPERATIONS, AugmentPreset

#: Row of parameters of one (image, view), float32: the number of operations, their codes in order of application
#: (-1: none), contrast factor, blur sigma in pixels, cropped share top, bottom, left, right, sharpen alpha and
#: lightness, angle in degrees, solarise threshold, jitter factors (brightness, contrast, saturation) and shift (hue),
#: 4x4 grid shifts (row by row, each y then x), corner shifts (clockwise from top left, each y then x), the jitter's
#: four steps in order of application, top, left, height and width of the resized crop, largest radius of the blur.
COUNT, ORDER, CONTRAST, SIGMA, ROWS, COLUMNS, SHARPEN, ANGLE, THRESHOLD, JITTER = 0, 1, 27, 28, 29, 31, 33, 35, 36, 37
GRID, CORNERS, JITTER_ORDER, BOX, RADIUS, ROW = 41, 73, 81, 85, 89, 90
#: Words of a view: subset size, order of the first seven operations, the first twelve of RANGES, two a normal number
#: (grid, corners), order of the other operations, chances of `operations` and of `then`, the jitter's ranges and order,
#: two an attempt at a resized crop, its place.
WORD_ORDER, WORD_UNIFORM, WORD_GRID, WORD_CORNERS, WORD_ORDER_REST, WORD_CHANCES, WORD_THEN = (
    1,
    8,
    20,
    84,
    100,
    106,
    119,
)
WORD_JITTER, WORD_JITTER_ORDER, WORD_BOX, WORD_PLACE, WORDS = 132, 136, 140, 158, 160
#: Fields of a preset in the order in which the ranges stand in its table; crops have one for each side.
RANGES = (
    "contrast",
    "blur_sigma",
    "crop_rows",
    "crop_rows",
    "crop_columns",
    "crop_columns",
    "sharpen_alpha",
    "sharpen_lightness",
    "piecewise_affine",
    "perspective",
    "rotate",
    "solarise",
    "jitter_brightness",
    "jitter_contrast",
    "jitter_saturation",
    "jitter_hue",
    "resized_area",
    "resized_aspect",
)
#: Attempts at a resized crop that fits into the picture; the first one is cut where none does.
ATTEMPTS = 9
#: Corners move by at most this share of the sides: the four stay a convex quadrilateral.
MAX_CORNER = 0.3

_PRETRAIN = AugmentPreset()


@lru_cache(maxsize=64)
def ranges(preset: AugmentPreset) -> Tensor:
    """[2, len(RANGES)] float32: lowest values and spans; the logarithm's for `resized_aspect`."""
    pairs = torch.tensor([getattr(preset, name) for name in RANGES], dtype=torch.float64)
    pairs[-1] = pairs[-1].log()
    return torch.stack([pairs[:, 0], pairs[:, 1] - pairs[:, 0]]).float()


def sizes(preset: AugmentPreset) -> tuple[int, int]:
    """Smallest and largest number of operations that a view chooses."""
    return preset.subset or (len(preset.operations),) * 2


@lru_cache(maxsize=64)
def table(preset: AugmentPreset) -> Tensor:
    """The preset as float32 numbers, in the layout of `Preset` in csrc/augment_draw.h."""
    lists = []
    for chances in (preset.operations, preset.then):
        rest = [0.0] * (len(OPERATIONS) - len(chances))
        lists += [*(float(OPERATIONS.index(name)) for name, _ in chances), *rest, *(c for _, c in chances), *rest]
    head = [len(preset.operations), *sizes(preset), preset.order == "random", len(preset.then), preset.blur_radius]
    return torch.cat([torch.tensor([*head, *lists], dtype=torch.float32), ranges(preset).flatten()])


def draw_parameters(index: Tensor, *, seed: int, epoch: int, view: int, preset: AugmentPreset = _PRETRAIN) -> Tensor:
    """Random parameters of one view, a pure function of (seed, epoch, index, view).

    Args:
        index: [B] int64 in [0, 2^48); the samples.
        seed: 64-bit key.
        epoch: below 2^32.
        view: number of the view; it chooses the stream AUGMENT + view.
        preset: of the view.
    Returns:
        [B, ROW] float32 in the layout given at `ROW`; all parameters are drawn, whatever operations are chosen.
    """
    words = random.words(index, WORDS, seed=seed, stream=random.AUGMENT + view, epoch=epoch)
    rows = torch.full((index.numel(), ROW), -1.0, device=index.device)
    rows[:, COUNT], rows[:, ORDER:CONTRAST] = _order(words, preset)
    low, span = ranges(preset).to(index.device)
    drawn = torch.cat([words[:, WORD_UNIFORM:WORD_GRID], words[:, WORD_JITTER:WORD_JITTER_ORDER]], 1)
    values = low[:16] + span[:16] * random.uniform(drawn)
    rows[:, CONTRAST:ANGLE], rows[:, ANGLE:GRID] = values[:, :8], values[:, 10:]
    node = (torch.arange(4, device=index.device) / 3.0).expand(4, 4)
    places = torch.stack([node.T, node], 2).flatten()
    shifts = values[:, 8:9] * random.normal(words[:, WORD_GRID:WORD_CORNERS])
    rows[:, GRID:CORNERS] = torch.maximum(torch.minimum(shifts, 1.0 - places), -places)  # nodes stay in the picture
    inwards = torch.tensor([1, 1, 1, -1, -1, -1, -1, 1], device=index.device)
    shifts = values[:, 9:10] * random.normal(words[:, WORD_CORNERS:WORD_ORDER_REST])
    rows[:, CORNERS:JITTER_ORDER] = inwards * shifts.abs().clamp(max=MAX_CORNER)
    rows[:, JITTER_ORDER:BOX] = random.permutation(words[:, WORD_JITTER_ORDER:WORD_BOX]).float()
    rows[:, BOX:RADIUS] = _box(words, low[16:].double(), span[16:].double())
    rows[:, RADIUS] = preset.blur_radius
    return rows


def _order(words: Tensor, preset: AugmentPreset) -> tuple[Tensor, Tensor]:
    """Number [B] and codes [B, CONTRAST - ORDER] of the operations in order of application."""
    count, (smallest, largest) = len(preset.operations), sizes(preset)
    keys = torch.cat([words[:, WORD_ORDER:WORD_UNIFORM], words[:, WORD_ORDER_REST:WORD_CHANCES]], 1)[:, :count]
    rank = random.permutation(random.permutation(keys))
    chosen = smallest + random.integers(words[:, :1], largest - smallest + 1)
    place = rank if preset.order == "random" else torch.arange(count, device=words.device).expand_as(rank)
    then = torch.arange(len(preset.then), device=words.device).expand(len(words), -1)
    chances = torch.tensor([c for _, c in (*preset.operations, *preset.then)], device=words.device)
    tried = torch.cat([words[:, WORD_CHANCES:][:, :count], words[:, WORD_THEN:][:, : len(preset.then)]], 1)
    kept = (random.uniform(tried) < chances) & torch.cat([rank < chosen, then >= 0], 1)
    place = torch.cat([place, count + then], 1).where(kept, 2 * len(OPERATIONS))
    codes = [OPERATIONS.index(name) for name, _ in (*preset.operations, *preset.then)]
    listed = torch.tensor(codes, device=words.device, dtype=torch.float32).expand(kept.shape)
    ordered = listed.where(kept, -1.0).gather(1, place.argsort(dim=1, stable=True))
    none = ordered.new_full((len(words), CONTRAST - ORDER - ordered.shape[1]), -1.0)
    return kept.sum(1).float(), torch.cat([ordered, none], 1)


def _box(words: Tensor, low: Tensor, span: Tensor) -> Tensor:
    """Top, left, height and width [B, 4] of the resized crop, shares of the picture: the first attempt that fits."""
    drawn = random.uniform(words[:, WORD_BOX:WORD_PLACE]).double().unflatten(1, (ATTEMPTS, 2))
    area, aspect = (low + span * drawn).unbind(2)
    sides = torch.stack([(area / aspect.exp()).sqrt(), (area * aspect.exp()).sqrt()], 2)
    first = (sides <= 1.0).all(2).int().argmax(1)
    chosen = sides[torch.arange(len(sides), device=words.device), first].clamp(max=1.0)
    return torch.cat([random.uniform(words[:, WORD_PLACE:WORDS]).double() * (1.0 - chosen), chosen], 1)


def only(rows: Tensor, name: str) -> Tensor:
    """Copy of rows of parameters [.., ROW] in which the one operation `name` is applied, with its drawn values."""
    rows = rows.clone()
    rows[..., COUNT], rows[..., ORDER:CONTRAST] = 1.0, -1.0
    rows[..., ORDER] = float(OPERATIONS.index(name))
    return rows
