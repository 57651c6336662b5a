"""The trainer with RCMSTR itself and its data."""

import json
import shutil

import pytest
import torch

from rcmstr_fast.config import ConfigError
from rcmstr_fast.train import checkpoint
from rcmstr_fast.train.exported import load_encoder
from rcmstr_fast.train.loop import pretrain
from rcmstr_fast.train.runfolder import RunFolder
from tests.train.compare import assert_same_run, metrics
from tests.train.launch import kill_at_random_moments, launch, start
from tests.train.real import real_config, write_words
from tests.train.test_distributed import assert_close_runs


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    """Twelve steps, four epochs, in one process."""
    return pretrain(real_config(tmp_path_factory.mktemp("real") / "run", words, train__steps=12))


def test_metrics_have_the_names_of_the_specification(run):
    line = metrics(run)[-1]
    names = {"loss", "loss_mim", "loss_rcl", "loss_hier", "loss_f2s", "loss_s2w", "grad_norm", "lr", "epoch", "samples"}
    names |= {f"{kind}_{level}" for kind in ("accuracy", "spread") for level in ("frame", "subword", "word")}
    assert names <= line.keys()
    assert line["epoch"] == 4.0 and line["samples"] == 96
    assert line["loss"] == pytest.approx(line["loss_mim"] + 0.1 * line["loss_rcl"], rel=1e-5)


#: The divisions differ in rounding alone, which so small a network amplifies in float32 to per cents within a few steps.
EXACT = {"train__precision": "fp64", "method__bn_group_size": 4}


def test_two_processes_equal_one(words, tmp_path):
    one = pretrain(real_config(tmp_path / "one", words, train__steps=12, **EXACT))
    fields = [f"{name}={value}" for name, value in EXACT.items()]
    done = launch("tests.train.real", str(tmp_path / "two"), str(words), "train__steps=12", *fields)
    assert [status for status, _ in done] == [0, 0], done
    assert_close_runs(one, tmp_path / "two", 1e-5, but=("running", "spread"))  # both a micro-batch


def test_accumulation_equals_the_whole_batch(words, tmp_path):
    # The same number of hidden pixels in every micro-batch.
    fields = {"method__num_blocks": 0, "train__steps": 3, **EXACT}
    whole = pretrain(real_config(tmp_path / "whole", words, **fields))
    parts = pretrain(real_config(tmp_path / "parts", words, train__accumulate=2, **fields))
    once_a_micro_batch = ("running", "batches_tracked", "spread")
    assert_close_runs(whole, parts, 1e-5, but=once_a_micro_batch)


def test_interrupted_and_continued_is_bit_exact(words, run, tmp_path):
    """A run of 12 steps whose folder goes back to the state in which a kill after step 4 leaves it."""
    copy = tmp_path / "run"
    pretrain(real_config(copy, words, train__steps=12, train__save_every=4))
    folder = RunFolder(copy)
    assert checkpoint.load(folder.checkpoints / "previous.pt")["step"] == 8
    folder.last.unlink()
    pretrain(real_config(copy, words, train__steps=12, train__save_every=4))
    assert metrics(copy) == metrics(run)
    shutil.rmtree(tmp_path / "run")


@pytest.mark.slow
def test_killed_at_ten_random_moments_continues_bit_exact(words, tmp_path):
    fields = {"train__steps": 40, "train__save_every": 1, "train__global_batch_size": 4}
    whole = pretrain(real_config(tmp_path / "whole", words, **fields))
    settings = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
    reached = kill_at_random_moments("tests.train.real", tmp_path / "run", str(words), *settings, within=0.3)
    assert len(reached) > 3
    assert start("tests.train.real", str(tmp_path / "run"), str(words), *settings).wait()[0] == 0
    assert_same_run(tmp_path / "run", whole)


def test_exported_encoder_is_the_trained_one(run):
    encoder, rectifier, header = load_encoder(run)
    method = checkpoint.load(RunFolder(run).last)["method"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, method[f"online.encoder.{name}"]), name
    assert header["frames"] == 10 and header["out_channels"] == encoder.out_channels and header["step"] == 12
    assert (header["height"], header["image_width"]) == (32, 36) and isinstance(rectifier, torch.nn.Identity)
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, 32, 36)).shape == (1, header["frames"], header["out_channels"])


def test_rectifier_is_exported_too(words, tmp_path):
    run = pretrain(real_config(tmp_path / "run", words, model__tps="trainable", train__steps=1))
    _, rectifier, header = load_encoder(RunFolder(run).encoder)
    method = checkpoint.load(RunFolder(run).last)["method"]
    assert header["rectifier"] == "trainable"
    for name, value in rectifier.state_dict().items():
        assert torch.equal(value, method[f"online.rectifier.{name}"]), name


def test_views_are_drawn(run):
    from PIL import Image

    with Image.open(RunFolder(run).pictures) as sheet:
        assert sheet.width > 6 * 72 and sheet.height > 8 * 64


def test_resolved_config_runs_again_by_the_command_line(words, run, tmp_path):
    from rcmstr_fast.cli.main import main

    again = tmp_path / "again"
    assert main(["pretrain", "--config", str(RunFolder(run).config), "--run", str(again)]) == 0
    assert_same_run(again, run)


@pytest.mark.parametrize("damage", ["cut", "foreign", "header", "key", "shape"])
def test_damaged_export_is_one_line(run, tmp_path, damage):
    import safetensors.torch
    from safetensors import safe_open

    path = tmp_path / "encoder.safetensors"
    data = RunFolder(run).encoder.read_bytes()
    with safe_open(RunFolder(run).encoder, "pt") as opened:
        header = opened.metadata()
    tensors = safetensors.torch.load(data)
    name = next(iter(tensors))
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "foreign":
        path.write_bytes(safetensors.torch.save(tensors))
    elif damage == "header":
        broken = json.loads(header["rcmstr_fast"]) | {"config": {}}
        path.write_bytes(safetensors.torch.save(tensors, {"rcmstr_fast": json.dumps(broken)}))
    elif damage == "key":
        path.write_bytes(safetensors.torch.save({k: v for k, v in tensors.items() if k != name}, header))
    else:
        path.write_bytes(safetensors.torch.save(tensors | {name: torch.zeros(1)}, header))
    with pytest.raises(ConfigError, match=r"encoder\.safetensors") as error:
        load_encoder(path)
    assert "\n" not in str(error.value)


def test_missing_export_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="there is none"):
        load_encoder(tmp_path)


def test_no_roots_and_too_few_images(words, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.roots must name"):
        pretrain(real_config(tmp_path / "run", words, data__roots=[]))
    with pytest.raises(ConfigError, match="at most the 24 images of an epoch, got 32"):
        pretrain(real_config(tmp_path / "run", words, train__global_batch_size=32))
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_run_is_continued(words, tmp_path):
    fields = {
        "train__device": "cuda",
        "train__precision": "bf16",
        "optim__schedule": "constant",
        "optim__warmup_steps": 0,
    }
    run = pretrain(real_config(tmp_path / "run", words, train__steps=4, **fields))
    pretrain(real_config(tmp_path / "run", words, train__steps=8, **fields))
    whole = pretrain(real_config(tmp_path / "whole", words, train__steps=8, **fields))
    one, other = (metrics(folder)[-1] for folder in (run, whole))
    assert one["step"] == other["step"] == 8 and one["nonfinite"] == 0
    assert one["loss"] == pytest.approx(other["loss"], rel=0.1)
