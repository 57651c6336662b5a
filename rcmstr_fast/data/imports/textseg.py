"""TextSeg: one patch a word out of whole pictures, with its mask, for text segmentation."""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rcmstr_fast.config import DataConfig
from rcmstr_fast.data.decode import BrokenImage, decode_picture
from rcmstr_fast.data.imports.files import Files
from rcmstr_fast.data.imports.plan import Problems
from rcmstr_fast.data.lists import PAIRS
from rcmstr_fast.data.progress import progress

_MASK = re.compile(r"(?P<base>(?:.*/)?)semantic_label/(?P<id>[^/]+)_maskfg\.png")
#: Value of the pixels of words in the semantic masks (0 is background, 200 a word's effects, 255 not decided).
_WORD = 100


@dataclass
class Patches:
    """What was cut.

    Attributes:
        total: words of the annotations, and pictures without usable ones.
        parts: part -> patches written.
        problems: reason -> words and pictures left out.
    """

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    problems: Problems = field(default_factory=dict)

    def leave_out(self, reason: str, name: str) -> None:
        """One more word (or picture) that is not cut."""
        self.total += 1
        self.problems.setdefault(reason, []).append(name)


def is_textseg(files: Files) -> bool:
    """Whether there is a semantic_label/ID_maskfg.png."""
    return any(_MASK.fullmatch(name) for name in files.names.names)


def cut_patches(files: Files, folder: Path, *, split: bool = True) -> Patches:
    """Write images/, masks/ (white = text) and pairs.tsv (picture, mask, text), below PART/ where there is a split.json.

    A patch is the smallest upright rectangle around the box of a word. Pictures and masks must be of one size.

    Args:
        files: `image/ID.jpg`, `semantic_label/ID_maskfg.png`, `annotation/ID_anno.json` or `bpoly_label/ID_anno.json`
            (word number -> {text, bbox: x1, y1, .., x4, y4}) and `split.json` (part -> ids).
        folder: to write to; exists.
        split: whether the parts of split.json get folders of their own.
    """
    done = Patches()
    lines: dict[str, list[str]] = {}
    masks = [match for name in sorted(files.names.names) if (match := _MASK.fullmatch(name))]
    parts = _parts(files, masks[0]["base"]) if split and masks else {}
    for match in progress(masks, len(masks), "cutting", "pictures"):
        one = match["id"]
        part = parts.get(one, "") if parts else ""
        if parts and not part:
            done.leave_out("in no part of split.json", one)
            continue
        for number, text, patch, mask in _patches(files, match, done):
            name = f"{one}_{number}.png"
            for kind, picture in (("images", patch), ("masks", mask)):
                (folder / part / kind).mkdir(parents=True, exist_ok=True)
                picture.save(folder / part / kind / name)
            done.total += 1
            done.parts[part] = done.parts.get(part, 0) + 1
            shown = " ".join(text.split())
            lines.setdefault(part, []).append(f"images/{name}\tmasks/{name}\t{shown}\n")
    for part, pairs in lines.items():
        (folder / part / PAIRS).write_text("".join(pairs), "utf-8")
    return done


def _parts(files: Files, base: str) -> dict[str, str]:
    """Picture -> part, of split.json."""
    name = f"{base}split.json"
    if name not in files.names.names:
        return {}
    try:
        given = json.loads(files.text(name))
        return {str(one): str(part) for part, ids in given.items() if _plain(str(part)) for one in ids}
    except (ValueError, AttributeError, TypeError):
        return {}


def _plain(name: str) -> bool:
    """Whether a name out of a file can be that of a folder or file here."""
    return re.fullmatch(r"[\w-]+", name) is not None


def _patches(files: Files, match: re.Match[str], done: Patches) -> Iterator[tuple[str, str, Image.Image, Image.Image]]:
    """(word number, text, patch, mask) of one picture; what cannot be cut is noted."""
    base, one = match["base"], match["id"]
    words = _words(files, base, one)
    if words is None:
        done.leave_out("annotation missing or unreadable", one)
        return
    opened = _open(files, base, one, match.string)
    for number, word in words.items():
        name = f"{one}, word {number}"
        box = _box(word.get("bbox") if isinstance(word, dict) else None)
        if isinstance(opened, str):
            done.leave_out(opened, name)
            continue
        picture, mask = opened
        box = box and (max(box[0], 0), max(box[1], 0), min(box[2], picture.width), min(box[3], picture.height))
        if not box or box[2] - box[0] < 2 or box[3] - box[1] < 2 or not _plain(str(number)):
            done.leave_out("no usable box", name)
            continue
        yield number, str(word.get("text") or ""), picture.crop(box), mask.crop(box)


def _open(files: Files, base: str, one: str, mask_name: str) -> tuple[Image.Image, Image.Image] | str:
    """Picture and mask (white = text), or why they cannot be used."""
    limits = {"max_pixels": DataConfig().max_pixels * 4, "min_side": 2}
    name = next((n for s in (".jpg", ".png", ".jpeg") if (n := f"{base}image/{one}{s}") in files.names.names), None)
    if name is None:
        return "picture missing"
    try:
        picture = decode_picture(files.picture(name), **limits)
        with Image.open(io.BytesIO(files.picture(mask_name)), formats=("PNG",)) as stored:
            if stored.size != picture.size:
                return "mask of another size than its picture"
            mask = np.asarray(stored.convert("L") if stored.mode not in ("L", "P") else stored)
    except (BrokenImage, OSError, ValueError, SyntaxError):
        return "picture or mask unreadable"
    return picture, Image.fromarray(np.where(mask == _WORD, 255, 0).astype(np.uint8))


def _words(files: Files, base: str, one: str) -> dict[str, Any] | None:
    names = [f"{base}{folder}/{one}_anno.json" for folder in ("annotation", "bpoly_label")]
    name = next((name for name in names if name in files.names.names), None)
    try:
        found = json.loads(files.text(name)) if name else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _box(corners: Any) -> tuple[int, int, int, int] | None:
    """(left, top, right, bottom) of four corners x1, y1, .., x4, y4 (or of two)."""
    try:
        values = [float(value) for value in np.asarray(corners, dtype=np.float64).reshape(-1)]
    except (TypeError, ValueError):
        return None
    if len(values) < 4 or len(values) % 2 or not np.isfinite(values).all():
        return None
    across, down = values[0::2], values[1::2]
    return int(np.floor(min(across))), int(np.floor(min(down))), int(np.ceil(max(across))), int(np.ceil(max(down)))
