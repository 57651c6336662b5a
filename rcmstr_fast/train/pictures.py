"""views.png: what the network really sees, one word a row, one stage a column, in bands that fit a screen."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from rcmstr_fast.train.checkpoint import write_whole

_GAP, _LABEL = 4, 20


def contact_sheet(columns: dict[str, Tensor], scale: int = 2, across: int = 7) -> Image.Image:
    """Lay out images in labelled columns.

    Args:
        columns: label -> [n, 3, H, W] float in [0, 1] or [n, H, W, 3] uint8; n, H and W may differ.
        scale: pixels a pixel.
        across: columns in a band; the next ones go below.
    """
    pictures = {name: [_image(x, scale) for x in batch] for name, batch in columns.items()}
    rows = max(len(batch) for batch in pictures.values())
    width = max(p.width for batch in pictures.values() for p in batch) + _GAP
    height = max(p.height for batch in pictures.values() for p in batch) + _GAP
    band, bands = _LABEL + rows * height, -(-len(pictures) // across)
    sheet = Image.new("RGB", (_GAP + min(across, len(pictures)) * width, _GAP + bands * band), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14) if features.check("freetype2") else None
    for i, (name, batch) in enumerate(pictures.items()):
        left, top = _GAP + i % across * width, _GAP + i // across * band
        draw.text((left, top), name, fill="black", font=font)
        for r, picture in enumerate(batch):
            sheet.paste(picture, (left, top + _LABEL + r * height))
    return sheet


def _image(picture: Tensor, scale: int) -> Image.Image:
    if picture.dtype != torch.uint8:
        picture = (picture.detach().float().permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8)
    image = Image.fromarray(np.ascontiguousarray(picture.cpu().numpy()))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def write_sheet(path: Path, columns: dict[str, Tensor]) -> None:
    """Write the contact sheet as PNG."""
    buffer = io.BytesIO()
    contact_sheet(columns).save(buffer, "PNG")
    write_whole(path, lambda file: file.write(buffer.getvalue()))
