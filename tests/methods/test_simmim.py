"""SimMIM against loops over the hidden pixels, in float64."""

import dataclasses

import pytest
import torch

from rcmstr_fast.config import resolve
from rcmstr_fast.methods import find
from tests.methods.harness import BATCH, batches, case_config, make_trainer
from tests.oracles.in_batch import pixel_loss


def made(encoder, folder, **fields):
    config = case_config("simmim", encoder, precision="fp64")
    config.model.image_width = 64
    config.method = dataclasses.replace(config.method, **fields)
    trainer = make_trainer(resolve(config), folder)
    return trainer.method, batches(trainer, 0)[0]


@pytest.mark.parametrize(("kind", "power"), [("mse", 2), ("l1", 1)])
@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
@pytest.mark.parametrize("blocks", [0, 2])
def test_loss_is_a_mean_over_hidden_pixels(encoder, kind, power, blocks, tmp_path):
    method, batch = made(encoder, tmp_path, pixel_loss=kind, num_blocks=blocks)
    masks = method.mim.masks(batch)
    with torch.no_grad():
        prediction = method.mim.head(*method.encoder.forward_masked(batch.views["image"], masks, "anchored"))
    target = batch.images.permute(0, 3, 1, 2).double() / 255  # the resized original: no augmentation
    expected = pixel_loss(prediction.numpy(), target.numpy(), masks.pixels.numpy(), power)
    # the view is float32 before it is float64
    assert float(method(batch).loss.detach()) == pytest.approx(expected, rel=1e-5)
    cells = masks.grid[0].numel()
    hidden = masks.grid.flatten(1).sum(1)
    assert (hidden == cells // 2).all() if blocks == 0 else (hidden > cells // 2).all()


def test_a_whole_pass_keeps_running_statistics(tmp_path):
    for whole in (True, False):
        method, batch = made("resnet29", tmp_path / str(whole), whole_pass=whole)
        method(batch).loss.backward()
        norm = method.encoder.stages[0].layers[0].bn
        assert (norm.running_mean.abs().sum() > 0) == whole
        assert all(p.grad is not None for p in method.encoder.parameters())


def test_a_flat_prediction_shows(tmp_path):
    method, batch = made("vit_tiny", tmp_path)
    healthy = method(batch).monitors["detail"]
    with torch.no_grad():
        for p in method.mim.head.layers[-1].parameters():
            p.zero_()
    assert method(batch).monitors["detail"] < 1e-6 < healthy
    assert len(find("simmim").method.views(method.config)) == 1 and len(batch.index) == BATCH
