"""RCMSTR itself in the trainer: `python -m tests.train.real RUN LMDB field=value ...` is a tiny run."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import torch
import yaml
from PIL import Image, ImageDraw

from rcmstr_fast.config import PretrainConfig
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.methods import settings
from rcmstr_fast.train.loop import pretrain
from rcmstr_fast.train.stream import Stream
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
        "data__roots": [str(data)],
        "data__workers": 1,
        "preset": "paper",
        "model__width": 0.25,
        "model__projector_hidden": 16,
        "model__feature_dim": 16,
        "model__image_width": 36,
        "method__queue_size": 64,
        "method__bn_group_size": 2,
        "method__bn_shuffle": False,
        "method__group_size": 2,
        "train__global_batch_size": 8,
        "train__log_every": 1,
        "train__save_every": 100,
        "train__steps": 3,
        "optim__lr": 1e-3,
    }
    name = fields.pop("method__name", "rcmstr")
    return toy_config(run, settings(name), **(tiny | fields))


class WatchedStream(Stream):
    """Notes what each step shows to this process in `shown.jsonl` beside the run; `kill`: dies before that step."""

    def __init__(self, config, kill=-1):
        super().__init__(config)
        self.kill = kill

    def batches(self, step, plan, world):
        for micro in super().batches(step, plan, world):
            if step == self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            for part, batch in enumerate(micro):
                first = (part * world.world_size + world.rank) * plan.micro_batch
                for i, slot in enumerate(batch.index.tolist()):
                    pixels = sum(float(view[i].double().sum()) for view in batch.views.values())
                    note = {"step": step, "place": first + i, "slot": slot, "pixels": pixels}
                    with open(f"{self.config.run}.shown.jsonl", "a") as file:
                        file.write(json.dumps(note) + "\n")
            step += 1
            yield micro


def shown(run) -> dict[tuple[int, int], tuple[int, float]]:
    """(step, place in the global batch) -> slot and sum of its views; what a killed run showed again must agree."""
    seen: dict[tuple[int, int], tuple[int, float]] = {}
    for line in Path(f"{run}.shown.jsonl").read_text().splitlines():
        note = json.loads(line)
        place, what = (note["step"], note["place"]), (note["slot"], note["pixels"])
        assert seen.setdefault(place, what) == what, place
    return seen


def main(argv: list[str]) -> int:
    torch.set_num_threads(1)
    fields = {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in argv[2:])}
    kill = fields.pop("kill", -1)
    pretrain(real_config(argv[0], argv[1], **fields), open_stream=lambda config: WatchedStream(config, kill))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
