"""Pictures with masks of their text: which pairs are used, and how they are decoded and shown to the network."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rcmstr_fast.config import ConfigError, DataConfig
from rcmstr_fast.data.decode import TALL, BrokenImage, decode_picture, picture_size
from rcmstr_fast.data.labelled import seeded_share
from rcmstr_fast.data.lists import PAIRS
from rcmstr_fast.data.progress import in_threads
from rcmstr_fast.data.sets import FolderSet
from rcmstr_fast.data.source import ImageSource
from rcmstr_fast.evaluation.assemble import arranged
from rcmstr_fast.evaluation.config import SegmentConfig
from rcmstr_fast.evaluation.decoder_data import Feed, WordImages, Words
from rcmstr_fast.evaluation.probe_data import ProbeData
from rcmstr_fast.ops import augment_views
from rcmstr_fast.ops.augment_views import PRESETS, AugmentPreset

#: Grey level from which on a pixel of a mask is text.
_WHITE = 128
_LIGHT = PRESETS["light"]
assert isinstance(_LIGHT, AugmentPreset)
#: The same draws as `light`, of which only the crops do anything: a mask has no contrast and no focus.
_LIGHT_OF_MASKS = dataclasses.replace(_LIGHT, contrast=(1.0, 1.0), blur_sigma=(0.1, 0.1))

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs(Words):
    """Pictures with masks.

    Attributes, beside those of `Words`, whose labels are the texts (empty where there is none):
        masks: where the masks are; they have the record numbers of their pictures.
        total: pairs listed, and pictures without one.
        dropped: reason -> pairs and pictures left out; with the usable records they add up to `total`.
    """

    masks: ImageSource = field(kw_only=True)
    total: int = field(default=0, kw_only=True)
    dropped: dict[str, int] = field(default_factory=dict, kw_only=True)

    def take(self, positions: Sequence[int] | np.ndarray) -> "Pairs":
        """The pairs at these positions, in this order."""
        positions = np.asarray(positions, dtype=np.int64)
        labels = [self.labels[i] for i in positions]
        return dataclasses.replace(self, records=self.records[positions], labels=labels)


def open_pairs(roots: Sequence[str], what: str) -> Pairs:
    """Every usable pair of the roots; what is left out is counted and named in one line of the log.

    A pair is left out whose picture or mask is missing, cannot be decoded, or has another size than the other; and so
    is a picture in `images/` that no pair names.

    Args:
        roots: folders with pairs.tsv.
        what: the configuration field they come from, for messages.
    Raises:
        ConfigError: there is no pairs.tsv, no pair can be used, or no mask of them has text.
    """
    listed = [_listed(Path(root), what) for root in roots]
    source, masks = (
        ImageSource(
            roots,
            [
                [FolderSet(Path(root).absolute().name, root, [line[column] for line in found[0]])]
                for root, found in zip(roots, listed)
            ],
        )
        for column in (0, 1)
    )
    left_out: dict[str, list[str]] = {}
    for _, problems in listed:
        for reason, names in problems.items():
            left_out.setdefault(reason, []).extend(names)
    usable, white = [], 0
    for chunk in in_threads(lambda records: _looked_at(source, masks, records), len(source), 0, f"looking at {what}"):
        for record, found in chunk:
            if isinstance(found, str):
                left_out.setdefault(found, []).append(f"{source.name(record)} and {masks.name(record)}")
            else:
                usable.append(record)
                white += found
    dropped = {reason: len(names) for reason, names in left_out.items()}
    told = "; ".join(f"{len(names)} {reason}, such as {names[0]}" for reason, names in left_out.items())
    where = ", ".join(roots)
    if not usable:
        raise ConfigError(f"{what} must hold pictures with masks, got none in {where}" + (f": {told}" if told else ""))
    if not white:
        raise ConfigError(f"{what}: none of the {len(usable)} masks of {where} has text (white pixels)")
    if told:
        _log.warning(
            "%s: %d of %d pairs are left out: %s",
            what,
            sum(dropped.values()),
            len(usable) + sum(dropped.values()),
            told,
        )
    texts = [line[2] for found, _ in listed for line in found]
    total = len(usable) + sum(dropped.values())
    labels = [texts[record] for record in usable]
    return Pairs(source, np.array(usable, dtype=np.int64), labels, masks=masks, total=total, dropped=dropped)


def _listed(root: Path, what: str) -> tuple[list[tuple[str, str, str]], dict[str, list[str]]]:
    """(picture, mask, text) of each line of pairs.tsv, and what cannot be: reason -> examples."""
    path = root / PAIRS
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what}: {path} must be UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"{what} must name folders with {PAIRS} (picture, tab, mask) beside images/ and masks/, {root} has none "
            f"({error.strerror})"
        ) from error
    lines: list[tuple[str, str, str]] = []
    problems: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        columns = line.split("\t")
        if not line.strip():
            continue
        if len(columns) < 2 or not all(_inside(name) for name in columns[:2]):
            problems.setdefault("lines that are not 'picture TAB mask' below the folder", []).append(f"line {number}")
            continue
        lines.append((columns[0], columns[1], columns[2] if len(columns) > 2 else ""))
    named = {os.path.normpath(line[0]) for line in lines}
    pictures = sorted((root / "images").iterdir()) if (root / "images").is_dir() else []
    for picture in pictures:
        if os.path.join("images", picture.name) not in named and not picture.name.startswith("."):
            problems.setdefault("pictures without a line in pairs.tsv", []).append(str(picture))
    return lines, problems


def _inside(name: str) -> bool:
    """Whether a name stays below its folder."""
    return bool(name.strip()) and not os.path.isabs(name) and ".." not in Path(name).parts


def _looked_at(source: ImageSource, masks: ImageSource, records: range) -> list[tuple[int, str | bool]]:
    """Each record with whether its mask has text, or why the pair cannot be used."""
    found: list[tuple[int, str | bool]] = []
    for record, picture, mask in zip(records, source.read(records), masks.read(records)):
        reason: str | bool
        if picture is None or mask is None:
            reason = f"{'pictures' if picture is None else 'masks'} missing"
        elif (size := picture_size(picture)) is None:
            reason = "pictures unreadable"
        else:
            reason = _mask_of(mask, size)
        found.append((record, reason))
    return found


def _mask_of(data: bytes, size: tuple[int, int]) -> str | bool:
    try:
        mask = decode_mask(data)
    except BrokenImage:
        return "masks unreadable"
    if mask.size != size:
        return "masks of another size than their pictures"
    return bool(np.asarray(mask).max() >= _WHITE)


def decode_mask(data: bytes) -> Image.Image:
    """An encoded mask as grey levels, in its own size; raises BrokenImage."""
    return decode_picture(data, max_pixels=DataConfig().max_pixels, min_side=1).convert("L")


def split_pairs(pairs: Pairs, val_fraction: float, subset: float, seed: int) -> tuple[Pairs, Pairs]:
    """A seeded random subset for training and other pairs for validation, as `decoder_data.split_words`.

    Raises:
        ConfigError: no training pair is left.
    """
    val = seeded_share(pairs.records, val_fraction, seed) if val_fraction else np.empty(0, np.int64)
    both = seeded_share(pairs.records, min(1.0, val_fraction + subset * (1 - val_fraction)), seed)
    rest = np.setdiff1d(both, val)
    if not len(rest):
        raise ConfigError(f"train: {len(pairs)} pairs are too few for val_fraction={val_fraction} and subset={subset}")
    return pairs.take(rest), pairs.take(val)


def open_segment_data(config: SegmentConfig, tests: dict[str, str]) -> ProbeData:
    """Open every set, split, choose, and check that they are apart.

    Args:
        config: checked.
        tests: name -> folder.
    Raises:
        ConfigError: a set that cannot be read, has no usable pair, or overlaps another one.
    """
    usable = open_pairs(config.train, "train")
    train, val = split_pairs(usable, 0.0 if config.val else config.val_fraction, config.subset, config.seed)
    own_val = open_pairs(config.val, "val") if config.val else None
    opened: dict[str, Words] = {name: open_pairs([path], f"test {name}") for name, path in tests.items()}
    val_dropped = {} if own_val is None else own_val.dropped
    found = ProbeData(train, own_val or val, opened, usable.dropped, usable.total, val_dropped)
    return arranged(config, found, len(usable), own_val)


class PairImages(WordImages):
    """Decoded pictures with their masks as a fourth channel, 255 where more than half of a pixel is text."""

    channels = 4

    def _decode(self, positions: np.ndarray) -> np.ndarray:
        pictures, pairs = super()._decode(positions), self.words
        assert isinstance(pairs, Pairs)
        made = self._pool.map(self._mask, pairs.masks.read(pairs.records[positions]))
        masks = np.zeros(pictures.shape[:3], np.uint8)
        for i, mask in enumerate(made):
            if mask is None:
                pictures[i] = 0
                self.broken.setdefault(int(positions[i]), "mask unreadable")
            elif int(positions[i]) not in self.broken:
                masks[i] = mask
        return np.concatenate([pictures, masks[..., None]], axis=3)

    def _mask(self, data: bytes | None) -> np.ndarray | None:
        try:
            return fit_mask(decode_mask(data or b""), self._size, self._rotate)
        except BrokenImage:
            return None


def fit_mask(mask: Image.Image, size: tuple[int, int], rotate: str) -> np.ndarray:
    """A mask of grey levels at `size` (H, W), turned as its picture is: [H, W] uint8, 0 or 255."""
    shares = mask.point([0] * _WHITE + [255] * (256 - _WHITE))
    if rotate == "tall" and shares.height >= TALL * shares.width:
        shares = shares.transpose(Image.Transpose.ROTATE_90)
    resized = shares.resize((size[1], size[0]), Image.Resampling.BOX)
    return np.where(np.asarray(resized) >= _WHITE, np.uint8(255), np.uint8(0))


class PairFeed(Feed):
    """Tokens of pictures in batches, with their masks, which move as the pictures do."""

    def targets(
        self, positions: np.ndarray, loaded: np.ndarray | None, epoch: int, slots: np.ndarray, chosen: Sequence[int]
    ) -> Tensor:
        """Masks `[n, H, W]` float32 (1: text) of the chosen ones."""
        pairs = self.images.get(positions) if loaded is None else loaded
        device = self._world.device
        masks = torch.from_numpy(np.ascontiguousarray(pairs[chosen][..., 3])).to(device)
        if self._preset != "light":
            return (masks >= _WHITE).float()
        index = torch.from_numpy(slots[chosen]).to(device)
        moved = augment_views(
            masks[..., None].repeat(1, 1, 1, 3),
            seed=self._seed,
            epoch=epoch,
            index=index,
            num_views=1,
            size=(masks.shape[1], masks.shape[2]),
            preset=_LIGHT_OF_MASKS,
        )
        return (moved[0, :, 0] > 0).float()

    def terms(self, positions: np.ndarray) -> int:
        """The pictures."""
        return len(positions)

    def _encode(self, images: np.ndarray, epoch: int, slots: np.ndarray) -> Tensor:
        return super()._encode(np.ascontiguousarray(images[..., :3]), epoch, slots)
