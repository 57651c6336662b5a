"""Small sets of rendered digit words, and the tiny probe that reads them."""

import io
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from rcmstr_fast.config import ModelConfig
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.evaluation.config import ProbeConfig

#: ResNet-29 at a quarter of its width on short images: seconds instead of minutes.
MODEL = dict(encoder="resnet29", width=0.25, image_width=36)


def picture(text: str, note: str = "") -> bytes:
    """A word in Pillow's own font, as PNG; files with different notes are different by content."""
    image = Image.new("RGB", (40, 32), "white")
    ImageDraw.Draw(image).text((2, 2), text, fill="black", font=ImageFont.load_default(24))
    out = io.BytesIO()
    info = PngInfo()
    info.add_text("note", note)
    image.save(out, "PNG", pnginfo=info)
    return out.getvalue()


def digits(count: int, seed: int, longest: int = 2) -> list[str]:
    """Random words of digits."""
    draw = random.Random(seed)
    return ["".join(draw.choices("0123456789", k=draw.randint(1, longest))) for _ in range(count)]


def write_words(folder: Path, labels: list[str | None]) -> str:
    """An LMDB of rendered words; the path as a string."""
    write_lmdb(folder, ((picture(label or "?", f"{folder.name} {i}"), label) for i, label in enumerate(labels)))
    return str(folder)


def tiny_config(root: Path, **changes) -> ProbeConfig:
    """A probe over an untrained tiny encoder; the sets are written on the first call."""
    if not (root / "train").exists():
        write_words(root / "train", digits(60, 1))
        write_words(root / "test", digits(20, 2))
    fields = dict(
        run=str(root / "run"),
        encoder="random",
        model=ModelConfig(**MODEL),
        train=[str(root / "train")],
        test=[f"digits={root / 'test'}"],
        augment="none",
        steps=8,
        batch_size=16,
        eval_every=4,
        log_every=2,
        device="cpu",
        precision="fp32",
        workers=1,
    )
    return ProbeConfig(**(fields | changes))
