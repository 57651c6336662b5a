"""The online probe: it sees the encoder, and the run does not see it."""

import json

import pytest
import torch
from torch import nn

from rcmstr_fast.config import ConfigError
from rcmstr_fast.data.lmdb_writer import write_lmdb
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.loop import pretrain
from rcmstr_fast.train.online_probe import OnlineProbe, open_probe_words
from tests.evaluation.rendered import picture, write_words
from tests.train.toy import ToyEncoder, ToyMethod, ToyStream, toy_config


class Framed(ToyEncoder):
    """The toy's encoder, which outside of training gives 20 frames."""

    def forward(self, images):
        if self.training:
            return super().forward(images)
        return nn.functional.adaptive_avg_pool2d(self[2](self[1](self[0](images))), (1, 20))[:, :, 0].transpose(1, 2)


class FramedMethod(ToyMethod):
    def __init__(self, config, collectives):
        super().__init__(config, collectives)
        for name in ("online_encoder", "momentum_encoder"):
            made = Framed()
            made.load_state_dict(getattr(self, name).state_dict())
            setattr(self, name, made.requires_grad_(name == "online_encoder"))


def run(folder, **fields):
    config = toy_config(folder, **fields)
    return pretrain(config, build=FramedMethod, open_stream=lambda c: ToyStream(c))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_run_is_bit_for_bit_the_same_with_and_without(tmp_path):
    words = write_words(tmp_path / "words", [str(i % 10) for i in range(24)])
    run(tmp_path / "plain")
    fields = {"train__probe_every": 5, "train__probe_data": [words], "train__probe_words": 18}
    run(tmp_path / "probed", **fields)
    plain, probed = (checkpoint.load(tmp_path / name / "checkpoints/last.pt") for name in ("plain", "probed"))
    for part in ("method", "optimizer", "rng"):
        torch.testing.assert_close(probed[part], plain[part], rtol=0, atol=0)
    found = [line for line in lines(tmp_path / "probed") if "probe_accuracy" in line]
    assert [line["step"] for line in found] == [5, 10, 12]
    assert all(0 <= line["probe_accuracy"] <= line["probe_ned"] <= 1 for line in found)
    losses = [[x["loss"] for x in lines(tmp_path / name) if "loss" in x] for name in ("plain", "probed")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert (
        "online probe: a CTC probe, 12 words to learn from, 6 to test on" in (tmp_path / "probed/log.txt").read_text()
    )


class Reading(nn.Module):
    """Each column of a picture as a frame: the darkness of its pixels."""

    def forward(self, images):
        return images[:, 0, :, ::4].transpose(1, 2)


class Held:
    def exported(self):
        return {"encoder": Reading(), "rectifier": nn.Identity()}


def measured(tmp_path, labels, **fields):
    write_lmdb(tmp_path / "words", ((picture(label, str(i)), label) for i, label in enumerate(labels)))
    fields = {"train__probe_every": 1, "train__probe_data": [str(tmp_path / "words")], **fields}
    config = toy_config(tmp_path / "run", **fields)
    config.model.image_width, config.model.height = 40, 32
    words = open_probe_words(config)
    return words, OnlineProbe(words, Held(), 0, torch.device("cpu"))()


def test_words_that_can_be_told_apart_are_read(tmp_path):
    words, found = measured(tmp_path, [str(i % 4) for i in range(40)])
    assert words.charset is not None and words.train == 27 and len(words.labels) == 40
    assert found["probe_accuracy"] > 0.9 and found["probe_ned"] > 0.9
    again = measured(tmp_path / "again", [str(i % 4) for i in range(40)])[1]
    assert again == found


def test_labels_outside_the_charset_are_compared_as_words(tmp_path):
    words, found = measured(tmp_path, ["[+]", "(=)", "{#}"] * 6 + ["1"])
    assert words.charset is None
    assert found == {"probe_accuracy": 1.0}


@pytest.mark.parametrize(
    "labels, fields, message",
    [
        (["1", None], {}, "train.probe_data must hold at least 3 labelled pictures, got 1 of 2"),
        (["1"] * 3, {"train__probe_data": ["/no/such"]}, "train.probe_data: expected a folder"),
        (["1"] * 3, {"train__probe_data": []}, "train.probe_data must name labelled words"),
        (["1"] * 3, {"train__probe_words": 2}, "train.probe_words must be at least 3"),
    ],
)
def test_bad_data_end_the_run_before_it_begins(tmp_path, labels, fields, message):
    words = write_words(tmp_path / "words", labels)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", **({"train__probe_every": 5, "train__probe_data": [words]} | fields))
    assert not (tmp_path / "run").exists()
