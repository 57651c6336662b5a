"""views.png: what the network really sees, one word a row, one stage a column, in bands that fit a screen."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from rcmstr_fast.train.checkpoint import write_whole

_GAP, _LABEL = 4, 20
#: What the columns are, for a reader who meets the sheet before the documents; the other columns are single operations.
CAPTIONS = {
    "original": "the crop as it was decoded, at the size of the network's input",
    "query": "the view whose features are trained",
    "key": "another view of the same crop, for the momentum network: its features are what the query is compared with",
    "permuted": "strips of the query view, put in another order among several crops; their features are put back",
    "masked": "that view with the patches that are hidden from the encoder in grey",
    "reconstruction": "what the network paints into the hidden patches; the visible ones are copied",
    "one": "the first view",
    "two": "the second view",
    "image": "the view that is shown to the network",
    "plain": "the crop without augmentation",
    "augmented": "the augmented view",
    "mim": "the view that is masked",
}
_OTHERS = "%s: one operation of the augmentation alone (docs/ops); the views go through all of them"


def contact_sheet(
    columns: dict[str, Tensor], scale: int = 2, across: int = 7, captions: Sequence[str] = ()
) -> Image.Image:
    """Lay out images in labelled columns.

    Args:
        columns: label -> [n, 3, H, W] float in [0, 1] or [n, H, W, 3] uint8; n, H and W may differ.
        scale: pixels a pixel.
        across: columns in a band; the next ones go below.
        captions: lines of text below the columns.
    """
    pictures = {name: [_image(x, scale) for x in batch] for name, batch in columns.items()}
    rows = max(len(batch) for batch in pictures.values())
    height = max(p.height for batch in pictures.values() for p in batch) + _GAP
    band, bands = _LABEL + rows * height, -(-len(pictures) // across)
    font = ImageFont.load_default(size=14) if features.check("freetype2") else None
    label, written = (
        max((int(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(line, font)) + 1 for line in lines), default=0)
        for lines in (pictures, captions)
    )
    width = max(label + _GAP, *(p.width for batch in pictures.values() for p in batch)) + _GAP
    size = max(min(across, len(pictures)) * width, written), bands * band + len(captions) * _LABEL
    sheet = Image.new("RGB", (_GAP + size[0], _GAP + size[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, batch) in enumerate(pictures.items()):
        left, top = _GAP + i % across * width, _GAP + i // across * band
        draw.text((left, top), name, fill="black", font=font)
        for r, picture in enumerate(batch):
            sheet.paste(picture, (left, top + _LABEL + r * height))
    for i, line in enumerate(captions):
        draw.text((_GAP, _GAP + bands * band + i * _LABEL), line, fill="black", font=font)
    return sheet


def captions_of(names: Iterable[str]) -> list[str]:
    """A line for each column that has a meaning of its own, in their order, and one for the operations together."""
    names = list(names)
    # A method that shows a view twice, whole and masked, calls the latter "NAME masked".
    known = [f"{name}: {CAPTIONS[name.split()[-1]]}" for name in names if name.split()[-1] in CAPTIONS]
    others = [name for name in names if name.split()[-1] not in CAPTIONS]
    lines = [_OTHERS % ", ".join(others)] if others else []
    return [*known[:1], *lines, *known[1:]]


def _image(picture: Tensor, scale: int) -> Image.Image:
    if picture.dtype != torch.uint8:
        picture = (picture.detach().float().permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8)
    image = Image.fromarray(np.ascontiguousarray(picture.cpu().numpy()))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def write_sheet(path: Path, columns: dict[str, Tensor]) -> None:
    """Write the contact sheet as PNG, with a caption for each column."""
    buffer = io.BytesIO()
    contact_sheet(columns, captions=captions_of(columns)).save(buffer, "PNG")
    write_whole(path, lambda file: file.write(buffer.getvalue()))
