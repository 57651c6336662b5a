"""RCMSTR itself in the trainer: `python -m tests.train.real RUN LMDB field=value ...` is a tiny run."""

import io
import sys
from pathlib import Path

import torch
import yaml
from PIL import Image, ImageDraw

from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.train.loop import pretrain
from tests.train.toy import toy_config


def write_words(folder: Path, count: int = 24) -> Path:
    """An LMDB of drawn words."""

    def words():
        for i in range(count):
            picture = Image.new("RGB", (100, 32), (200, 150 + i, 255 - 3 * i))
            ImageDraw.Draw(picture).text((4 + i % 5, 6), f"word{i}", fill=(i, 0, 60), font_size=18)
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            yield buffer.getvalue(), f"word{i}"

    write_lmdb(folder, words())
    return folder


def real_config(run, data, **fields) -> PretrainConfig:
    """RCMSTR with a narrow ResNet; batch norm and permutation work on pairs."""
    tiny = {
        "data__roots": [str(data)], "data__workers": 1, "preset": "paper",
        "model__width": 0.25, "model__projector_hidden": 16, "model__feature_dim": 16, "model__image_width": 36,
        "method__queue_size": 64, "method__bn_group_size": 2, "method__bn_shuffle": False, "method__group_size": 2,
        "train__global_batch_size": 8, "train__log_every": 1, "train__save_every": 100, "train__steps": 3,
        "optim__lr": 1e-3,
    }  # fmt: skip
    return toy_config(run, **(tiny | fields))


def main(argv: list[str]) -> int:
    torch.set_num_threads(1)
    words = (word.split("=", 1) for word in argv[2:])
    pretrain(real_config(argv[0], argv[1], **{name: yaml.safe_load(value) for name, value in words}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
