"""Made-up pictures with masks, and the tiny segmentation that learns from them."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rcmstr_fast.config import ModelConfig
from rcmstr_fast.evaluation.config import SegmentConfig
from tests.evaluation.rendered import MODEL

WIDTH = 36


def write_pairs(folder, count, seed=0, text="\tword"):
    """Dark bars on light ground; the mask is where the bar is."""
    draw = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    lines = []
    for i in range(count):
        mask = np.zeros((32, WIDTH), np.uint8)
        x, y = draw.integers(0, WIDTH - 16), draw.integers(0, 16)
        mask[y : y + 12, x : x + 14] = 255
        pixels = np.where(mask[..., None] > 0, 20, 230) + draw.integers(0, 20, (32, WIDTH, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"images/{i}.png")
        Image.fromarray(mask).save(folder / f"masks/{i}.png")
        lines.append(f"images/{i}.png\tmasks/{i}.png{text}\n")
    (folder / "pairs.tsv").write_text("".join(lines))
    return str(folder)


def tiny_segmentation(root, **changes) -> SegmentConfig:
    """A run over an untrained tiny encoder; the sets are written on the first call."""
    if not (root / "train").exists():
        write_pairs(root / "train", 24, 1)
        write_pairs(root / "test", 6, 2, text="")
    fields = dict(
        run=str(root / "run"),
        encoder="random",
        model=ModelConfig(**MODEL),
        train=[str(root / "train")],
        test=[f"bars={root / 'test'}"],
        steps=6,
        batch_size=8,
        eval_every=3,
        log_every=3,
        device="cpu",
        precision="fp32",
        workers=1,
        blocks=1,
        dim=16,
        augment="none",
    )
    return SegmentConfig(**(fields | changes))


def write_texts(folder: Path, count: int, seed: int) -> str:
    """Rendered words of three characters, dark on light with noise, and exactly their pixels as masks."""
    draw, font = np.random.default_rng(seed), ImageFont.load_default(24)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    lines = []
    for i in range(count):
        text = "".join(draw.choice(list("abdehknuxz0123"), 3))
        page = Image.new("L", (40, 32))
        ImageDraw.Draw(page).text((2, 1), text, fill=255, font=font)
        mask = np.asarray(page) >= 128
        ink, paper = draw.integers(0, 90, 3), draw.integers(150, 255, 3)
        pixels = np.where(mask[..., None], ink, paper) + draw.integers(-15, 15, (32, 40, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"images/{i}.png")
        Image.fromarray((mask * 255).astype(np.uint8)).save(folder / f"masks/{i}.png")
        lines.append(f"images/{i}.png\tmasks/{i}.png\t{text}\n")
    (folder / "pairs.tsv").write_text("".join(lines))
    return str(folder)
