"""The picture at the top of README: what goes into pretraining, what the network is shown, and what a recogniser says.

    python -m bench.report.overview docs/pictures/overview.png [--recogniser RUN] [--seed N]

The words are rendered, the views, strips and masks are made by the operations of the training step. With `--recogniser`
the last column is what that recogniser reads; without, the label, and the heading says so.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from rcmstr_fast import ops
from rcmstr_fast.data.decode import decode_image
from rcmstr_fast.data.source import open_sources
from rcmstr_fast.data.synth import SynthConfig, render_lmdb
from rcmstr_fast.methods import settings, to_pixels
from rcmstr_fast.methods.permutation import permuted_order
from rcmstr_fast.train.pictures import contact_sheet

WORDS = ("COFFEE", "market", "Exit 24", "Pharmacy", "open daily", "Station")
SIZE = (32, 128)


def main(arguments: list[str] | None = None) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--recogniser", type=str, default="", help="run folder of a probe")
    parser.add_argument("--seed", type=int, default=0, help="of the words and of all random choices")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        crops, labels = rendered(Path(folder), options.seed)
    shown = contact_sheet(columns(crops, options.seed), scale=1, across=5)
    texts, heading = labels, "out, with a decoder: text"
    if options.recogniser:
        import rcmstr_fast

        model = rcmstr_fast.load(options.recogniser, device="cpu")
        texts = [f"{x.text} ({x.confidence:.2f})" for x in model.read(crops.numpy())]
        heading = f"read by {Path(options.recogniser).name}"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    beside(shown, heading, texts).quantize(128).save(options.out, optimize=True)
    return 0


def rendered(folder: Path, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Crops [n, H, W, 3] uint8 and their texts."""
    (folder / "words.txt").write_text("\n".join(WORDS), encoding="utf-8")
    config = SynthConfig(
        out=str(folder / "set"),
        count=4 * len(WORDS),
        seed=seed,
        words=str(folder / "words.txt"),
        charset="any",
        numbers=0.0,
        random_text=0.0,
        punctuation=0.0,
        processes=1,
    )
    render_lmdb(config)
    source = open_sources([config.out])
    found: dict[str, tuple[str, bytes]] = {}  # the first crop of each word
    for i in range(len(source)):
        image, (label,) = source.read([i])[0], source.labels([i])
        if image is not None and label:
            found.setdefault(label.lower(), (label, image))
    crops = [
        torch.from_numpy(decode_image(image, *SIZE, max_pixels=1_000_000, min_side=2)) for _, image in found.values()
    ]
    return torch.stack(crops), [label for label, _ in found.values()]


def columns(crops: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Label -> pictures: the crops, two views, the permuted view, the masked view."""
    index, method = torch.arange(len(crops)), settings("rcmstr")
    order = permuted_order(index, 0, method, seed)  # type: ignore[arg-type]
    made = ops.augment_views(
        crops, seed=seed, epoch=0, index=index, num_views=2, size=SIZE, preset="pretrain", order=order
    )
    query, key, permuted = (to_pixels(view) for view in made)
    masks = ops.draw_masks(index, seed=seed, epoch=0, size=SIZE, unit="stage3", mask_ratio=0.7, num_blocks=1)
    return {
        "in: crops": crops,
        "shown: a view": query,
        "another view": key,
        "strips in disorder": permuted,
        "parts hidden": query.masked_fill(masks.pixels[: len(query)], 0.5),
    }


def beside(sheet: Image.Image, heading: str, texts: list[str], width: int = 190) -> Image.Image:
    """The sheet with a column of text at its right."""
    made = Image.new("RGB", (sheet.width + width, sheet.height), "white")
    made.paste(sheet, (0, 0))
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(size=14)
    draw.text((sheet.width + 8, 4), heading, fill="black", font=font)
    row = (sheet.height - 24) / len(texts)
    for i, text in enumerate(texts):
        draw.text((sheet.width + 8, 24 + i * row + row / 2 - 10), text, fill="black", font=font)
    return made


if __name__ == "__main__":
    raise SystemExit(main())
