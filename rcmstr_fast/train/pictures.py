"""views.png: what the network really sees, one word a row, one stage a column."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from rcmstr_fast.train.checkpoint import write_whole

_GAP, _LABEL = 4, 16


def contact_sheet(columns: dict[str, Tensor], scale: int = 2) -> Image.Image:
    """Lay out images in labelled columns.

    Args:
        columns: label -> [n, 3, H, W] float in [0, 1] or [n, H, W, 3] uint8; n, H and W may differ.
        scale: pixels a pixel.
    """
    pictures = {name: [_image(x, scale) for x in batch] for name, batch in columns.items()}
    rows = max(len(batch) for batch in pictures.values())
    width = max(p.width for batch in pictures.values() for p in batch)
    height = max(p.height for batch in pictures.values() for p in batch)
    size = (len(pictures) * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP + _LABEL)
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for c, (name, batch) in enumerate(pictures.items()):
        left = _GAP + c * (width + _GAP)
        draw.text((left, 2), name, fill=(0, 0, 0))
        for r, picture in enumerate(batch):
            sheet.paste(picture, (left, _LABEL + _GAP + r * (height + _GAP)))
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
