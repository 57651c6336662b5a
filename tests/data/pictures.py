"""Small sound pictures that differ in content."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(value: int, size: tuple[int, int] = (20, 8), format: str = "PNG", mode: str = "RGB") -> bytes:
    """A picture of one grey; size is (width, height)."""
    data = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), value % 256, np.uint8)).convert(mode).save(data, format)
    return data.getvalue()


def lay(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Write files below a folder; text as UTF-8, names with surrogates as their bytes."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder
