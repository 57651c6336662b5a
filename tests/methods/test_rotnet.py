"""TextRotNet against turns and sums written out in float64."""

import math

import pytest
import torch

from rcmstr_fast.methods.rotnet import turned
from tests.methods.harness import batches, case_config, make_trainer


def quarter_turn(pixels):
    """Rows of rows, anticlockwise: the last column becomes the first row."""
    return [[row[x] for row in pixels] for x in reversed(range(len(pixels[0])))]


def test_copies_are_turned_anticlockwise():
    square = torch.arange(48.0).view(1, 3, 4, 4)
    copies = turned(square)
    assert copies.shape == (1, 4, 3, 4, 4)
    for colour in range(3):
        pixels = square[0, colour].tolist()
        for copy in copies[0]:
            assert copy[colour].tolist() == pixels
            pixels = quarter_turn(pixels)


def test_half_a_turn_of_a_word_keeps_its_pixels_and_a_quarter_its_grey():
    words = torch.rand(2, 3, 32, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    copies = turned(words)
    assert torch.equal(copies[:, 2], words.flip(2, 3)) and copies.shape == (2, 4, 3, 32, 100)
    torch.testing.assert_close(copies[:, 1].flip(2, 3), copies[:, 3])
    # rows of the first copy are columns of the word, from the right
    ramp = torch.linspace(-1, 1, 100, dtype=torch.float64).expand(1, 3, 32, 100)
    rows = turned(ramp)[0, 1, 0].mean(1)
    assert rows[0] > 0.9 and rows[-1] < -0.9 and (rows.diff() < 0).all()


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_loss_by_copies(encoder, tmp_path):
    trainer = make_trainer(case_config("rotnet", encoder, precision="fp64"), tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    output = method(batch)
    weight, bias = (x.tolist() for x in (method.classifier.weight, method.classifier.bias))
    with torch.no_grad():
        frames = method.encoder(turned(batch.views["image"]).flatten(0, 1)).tolist()
    losses, right = [], []
    for number, rows in enumerate(frames):
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        scores = [sum(w * x for w, x in zip(row, mean, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        losses.append(math.log(sum(math.exp(s) for s in scores)) - scores[number % 4])
        right.append(scores.index(max(scores)) == number % 4)
    assert float(output.loss.detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert float(output.monitors["accuracy"]) == pytest.approx(sum(right) / len(right))


def test_one_answer_for_all_shows(tmp_path):
    trainer = make_trainer(case_config("rotnet", "vit_tiny"), tmp_path)
    with torch.no_grad():
        trainer.method.classifier.bias.copy_(torch.tensor([50.0, 0, 0, 0]))
    watched = trainer.method(batches(trainer, 0)[0]).monitors
    assert float(watched["entropy"]) < 1e-3 and float(watched["accuracy"]) == 0.25
