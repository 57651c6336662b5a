"""The package in three lines, and how little importing it costs."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import rcmstr_fast
from rcmstr_fast.config import ConfigError, PretrainConfig
from rcmstr_fast.methods import settings
from tests.evaluation.rendered import picture
from tests.exchange.tiny import CNN, TPS, write_encoder, write_recogniser


def test_importing_is_cheap():
    code = (
        "import sys, time; began = time.process_time(); import rcmstr_fast; spent = time.process_time() - began;"
        "print(sorted({'torch', 'numpy', 'PIL', 'lmdb'} & set(sys.modules)), spent < 1.0,"
        " sorted(set(rcmstr_fast.__all__) - set(dir(rcmstr_fast))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] True")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        rcmstr_fast.lod  # noqa: B018


def test_three_lines_that_read(tmp_path):
    write_recogniser(tmp_path / "recogniser.safetensors", **CNN)
    (tmp_path / "a.png").write_bytes(picture("12"))
    pil_image = Image.open(tmp_path / "a.png")
    model = rcmstr_fast.load(tmp_path, device="cpu")
    readings = model.read([str(tmp_path / "a.png"), np.asarray(pil_image), pil_image])
    assert readings[0] == readings[1] == readings[2]
    text, confidence, characters, error = readings[0]
    assert len(characters) == len(text) and 0 <= confidence <= 1 and error is None


def test_three_lines_that_encode(tmp_path):
    encoder, rectifier, config = write_encoder(tmp_path / "encoder.safetensors", **CNN, **TPS)
    loaded = rcmstr_fast.load_encoder(tmp_path, device="cpu")
    batch = loaded.images([picture("12"), picture("7")])
    assert batch.shape == (2, 3, 32, 36) and batch.min() >= -1 and batch.max() <= 1
    frames = loaded(batch)
    with torch.no_grad():
        assert torch.equal(frames, encoder(rectifier(batch)))
    assert torch.equal(loaded([picture("12"), picture("7")]), frames) and not frames.requires_grad
    assert loaded.size == (config.height, config.image_width) and loaded.facts["step"] == 7
    write_recogniser(tmp_path / "recogniser.safetensors", **CNN)
    assert rcmstr_fast.load_encoder(tmp_path / "recogniser.safetensors")(torch.zeros(1, 3, 32, 36)).shape == (
        1,
        10,
        128,
    )
    with pytest.raises(ConfigError, match="picture 1: not a picture"):
        loaded([picture("12"), b"junk"])


def test_pretrain_takes_fields_a_file_or_a_configuration(tmp_path, monkeypatch):
    from rcmstr_fast.train import loop

    seen = []
    monkeypatch.setattr(loop, "pretrain", lambda config: seen.append(config) or tmp_path)
    (tmp_path / "recipe.yaml").write_text("model:\n  width: 0.25\ntrain:\n  steps: 3\n")
    assert rcmstr_fast.pretrain(tmp_path / "recipe.yaml") == tmp_path
    rcmstr_fast.pretrain({"model": {"width": 0.25}, "train": {"steps": 3}})
    made = PretrainConfig(method=settings("rcmstr"))  # the method where none is named
    made.model.width, made.train.steps = 0.25, 3
    rcmstr_fast.pretrain(made)
    assert seen[0] == seen[1] == seen[2]
    rcmstr_fast.pretrain({"method": {"name": "seqmoco", "kl": False}})
    rcmstr_fast.pretrain("cnn_seqmoco_nokl")
    assert seen[3].method == seen[4].method == settings("seqmoco", kl=False)
    with pytest.raises(ConfigError, match="widht"):
        rcmstr_fast.pretrain({"model": {"widht": 0.25}})
