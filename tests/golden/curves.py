"""The 50-step loss curves of tiny models in float64; `python -m tests.golden.curves` writes them anew.

In float32 rounding alone moves so small a model by per cents within three steps, so no band would tell it from a change.

A change that moves a curve must say why in its commit.
"""

import json
from pathlib import Path

import torch

from rcmstr_fast import ops, random
from rcmstr_fast.methods import Batch, build_method
from rcmstr_fast.train.optim import build_optimizer
from tests.methods.tiny import tiny_config

HERE = Path(__file__).parent
STEPS, BATCH, WORDS = 50, 6, 24
#: The ViT at 1e-5 turns a difference of 1e-15 into per cents within 25 steps, at 2e-6 into 1e-7 within 50.
LR = {"resnet29": 1e-3, "vit_tiny": 2e-6}
CASES = [(name, encoder) for name in ("seqmoco", "rclstr", "rcmstr") for encoder in ("resnet29", "vit_tiny")]


def pictures(height: int, width: int) -> torch.Tensor:
    """Blocks of random colours as stand-ins for words: uint8 [WORDS, height, width, 3]."""
    drawn = random.words(torch.arange(WORDS), 4 * (width // 4) * 3, seed=7, stream=99, epoch=0) >> 24
    return drawn.reshape(WORDS, 4, width // 4, 3).repeat_interleave(8, 1).repeat_interleave(4, 2).to(torch.uint8)


def curve(name: str, encoder: str) -> list[float]:
    """Loss of each step."""
    config = tiny_config(encoder, BATCH, name=name, preset="fast", momentum=0.9, bn_group_size=2)
    config.optim.lr = LR[encoder]
    method = build_method(config).train().double()
    optimizer = build_optimizer(method, config.optim)
    images = pictures(config.model.height, config.model.image_width)
    losses = []
    for step in range(STEPS):
        index = (torch.arange(BATCH) + step * BATCH) % WORDS
        epoch = step * BATCH // WORDS
        views = ops.augment_views(
            images[index], seed=0, epoch=epoch, index=index, num_views=2,
            size=(config.model.height, config.model.image_width), backend="reference",
        ).double()  # fmt: skip
        method.begin_step()
        output = method(Batch({"query": views[0], "key": views[1]}, index, epoch), monitor=False)
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
    for case in CASES:
        losses = curve(*case)
        path(*case).write_text(json.dumps([round(x, 9) for x in losses], indent=0) + "\n")
        print(*case, losses[0], losses[-1])
