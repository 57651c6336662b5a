"""Loss curves of tiny models in float64; `python -m tests.golden.curves [NAME ..]` writes them, or those of NAME, anew.

The relational methods have a configuration of their own, every other method its smallest, on the CNN at an eighth of its
width, to keep the suite short.

In float32 rounding alone moves so small a model by per cents within three steps, so no band would tell it from a change.

Processors differ in the last bit of float32 logarithms and sines, so everything is float64 from the first weight on, and
views are made by exact shifts and one multiplication instead of the float32 augmentation.

A change that moves a curve must say why in its commit.
"""

import json
import sys
from pathlib import Path

import torch

from rcmstr_fast import random
from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.methods import CNN, Batch, build_method, every_method, find
from rcmstr_fast.train.optim import build_optimizer
from rcmstr_fast.train.targets import Targets
from tests.methods.harness import case_config
from tests.methods.tiny import tiny_config

HERE = Path(__file__).parent
STEPS, BATCH, WORDS = 50, 6, 24
#: The ViT at 1e-5 turns a difference of 1e-15 into per cents within 25 steps, at 2e-6 into 1e-7 within 50.
#: Two networks that play against each other, and choices of codes, do the same at 1e-3; at 1e-4 codes turn it into
#: 1e-10. SimAN still turned 1e-13 into 8e-5 there, and left the band on another processor; at 2e-5 into 1e-11, while a
#: gradient cut from content, style or opinion, or a rate 2 % higher, leaves the band by a factor of 7 to 12.
#: RCLSTR with the ViT differs by 4e-4 after 44 steps at 2e-6 between processors with and without AVX512.
LR = {
    "resnet29": 1e-3,
    "vit_tiny": 2e-6,
    "siman_resnet29": 2e-5,
    "persec_resnet29": 1e-4,
    "rclstr_vit_tiny": 5e-7,
}
RELATIONAL = ("seqmoco", "rclstr", "rcmstr")
CASES = [
    (spec.name, encoder)
    for spec in every_method()
    for encoder in ("resnet29", "vit_tiny")
    if encoder in spec.encoders and spec.method.__module__.startswith("rcmstr_fast.")
]


def pictures(height: int, width: int) -> torch.Tensor:
    """Blocks of random colours as stand-ins for words: uint8 [WORDS, height, width, 3]."""
    drawn = random.words(torch.arange(WORDS), 4 * (width // 4) * 3, seed=7, stream=99, epoch=0) >> 24
    return drawn.reshape(WORDS, 4, width // 4, 3).repeat_interleave(8, 1).repeat_interleave(4, 2).to(torch.uint8)


def view(images: torch.Tensor, index: torch.Tensor, epoch: int, number: int) -> torch.Tensor:
    """A view of uint8 images [B, h, w, 3]: contrast and a shift by a few pixels, [B, 3, h, w] float64 in [-1, 1]."""
    drawn = random.words(index, 2, seed=number, stream=98, epoch=epoch)
    contrast, shifts = 0.5 + drawn[:, 0].double() / 2**33, (drawn[:, 1] % 9 - 4).tolist()
    pixels = images.permute(0, 3, 1, 2).double() / 127.5 - 1
    moved = torch.stack([image.roll(shift, dims=2) for image, shift in zip(pixels, shifts)])
    return moved * contrast[:, None, None, None]


def curve(name: str, encoder: str) -> list[float]:
    """Loss of each step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return _curve(name, encoder)
    finally:
        torch.set_default_dtype(before)


def _config(name: str, encoder: str) -> PretrainConfig:
    if name in RELATIONAL:
        config = tiny_config(encoder, BATCH, name=name, preset="fast", momentum=0.9, bn_group_size=2)
    else:
        config = case_config(name, encoder)
        config.model.width = 0.125 if encoder in CNN else config.model.width
    config.optim.lr = LR.get(f"{name}_{encoder}", LR[encoder])
    return config


def _curve(name: str, encoder: str) -> list[float]:
    config, spec = _config(name, encoder), find(name)
    method = build_method(config).train().double()
    optimizer = build_optimizer(method, config.optim)
    images = pictures(config.model.height, config.model.image_width)
    wanted = [spec for spec in spec.method.views(config) if not spec.permuted_of]
    losses = []
    for step in range(STEPS):
        index = (torch.arange(BATCH) + step * BATCH) % WORDS
        epoch = step * BATCH // WORDS
        views = {one.name: view(images[index], index, epoch, number) for number, one in enumerate(wanted)}
        drawn = {} if name in RELATIONAL else spec.method.draw(config, index, epoch)
        if spec.labels:
            drawn |= Targets(config.method)([f"word{i}" for i in index.tolist()])
        progress = torch.tensor(step / STEPS)
        method.begin_step(progress)
        output = method(Batch(views, index, epoch, drawn, progress=progress), monitor=False)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.end_step()
        losses.append(float(output.loss.detach()))
    return losses


def path(name: str, encoder: str) -> Path:
    """Where a curve is kept."""
    return HERE / f"{name}_{encoder}.json"


if __name__ == "__main__":
    for case in (case for case in CASES if not sys.argv[1:] or case[0] in sys.argv[1:]):
        losses = curve(*case)
        path(*case).write_text(json.dumps([round(x, 9) for x in losses], indent=0) + "\n")
        print(*case, losses[0], losses[-1])
