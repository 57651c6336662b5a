"""MaskOCR against loops over pixels, latents and characters, in float64."""

import dataclasses
import math

import pytest
import torch

from rcmstr_fast.config import ConfigError, PretrainConfig, resolve
from rcmstr_fast.methods import settings
from rcmstr_fast.methods.parts.regression import read_losses
from tests.methods.harness import batches, case_config, make_trainer, take
from tests.oracles.in_batch import pixel_loss


def made(encoder, folder, **fields):
    config = case_config("maskocr", encoder, precision="fp64")
    config.model.image_width = 64
    config.method = dataclasses.replace(config.method, **fields)
    trainer = make_trainer(resolve(config), folder)
    return trainer.method, batches(trainer, 0)[0]


def patches_of(values, places, rows, height):
    """Pictures of patch values, one pixel at a time; patches stand row by row, 16 a row."""
    picture = torch.full((3, height, 64), 0.5, dtype=torch.float64)
    high = height // rows
    for row, place in zip(values, places, strict=True):
        top, left = place // 16 * high, place % 16 * 4
        for k, value in enumerate(row):
            colour, y, x = k // (high * 4), k // 4 % high, k % 4
            picture[colour, top + y, left + x] = value
    return picture


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_loss_by_pixels_latents_and_characters(encoder, tmp_path):
    method, batch = made(encoder, tmp_path)
    output, own = method(batch), method.own
    masks, images = method.masks(batch), batch.views["image"]
    with torch.no_grad():
        encode = method.encode_tokens if encoder == "vit_tiny" else method.encode_frames
        seen, seen_at, unseen, wanted, wanted_at, _ = encode(images, masks)
        guessed = method.regressor(seen, seen_at, unseen, wanted_at)
        values = method.decoder(guessed, wanted_at)
        logits = method.reader(seen, seen_at, unseen)
    squares, paintings, read = [], [], []
    for b in range(len(images)):
        if encoder == "vit_tiny":
            assert sorted(wanted_at[b].tolist()) == [
                y * 16 + x for y in range(8) for x in range(16) if masks.grid[b, 0, x]
            ]
            rows, chosen = range(len(guessed[b])), values[b]
            paintings.append(patches_of(chosen.tolist(), wanted_at[b].tolist(), 8, 32))
        else:
            rows = [t for t in range(17) if bool(unseen[b, t])]
            between = [(values[b, t] + values[b, t + 1]) / 2 for t in range(16)]
            paintings.append(patches_of([x.tolist() for x in between], range(16), 1, 32))
        errors = [
            sum((float(p) - float(q)) ** 2 for p, q in zip(guessed[b, t], wanted[b, t], strict=True))
            / len(wanted[b, t])
            for t in rows
        ]
        squares.append(sum(errors) / max(1, len(errors)))
        length = int(batch.drawn["lengths"][b])
        word = [int(i) + 1 for i in batch.drawn["targets"][b, :length]] + [0]
        terms = [math.log(sum(math.exp(float(s)) for s in row)) - float(row[c]) for row, c in zip(logits[b], word)]
        read.append(sum(terms) / len(terms) if length else 0.0)
    pixels = pixel_loss(torch.stack(paintings).numpy(), (images * 0.5 + 0.5).numpy(), masks.pixels.numpy())
    assert float(output.terms["loss_pixels"]) == pytest.approx(pixels, rel=1e-9)
    assert float(output.terms["loss_latents"]) == pytest.approx(sum(squares) / len(squares), rel=1e-9)
    assert float(output.terms["loss_language"]) == pytest.approx(sum(read) / len(read), rel=1e-9)
    total = pixels + own.align_weight * sum(squares) / len(squares) + own.language_weight * sum(read) / len(read)
    assert float(output.loss.detach()) == pytest.approx(total, rel=1e-9)
    assert read.count(0.0) == 1 and (masks.grid.sum((1, 2)) == int(0.7 * 16)).all()


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_no_hidden_pixel_is_seen(encoder, tmp_path):
    method, batch = made(encoder, tmp_path)
    encode = method.encode_tokens if encoder == "vit_tiny" else method.encode_frames
    masks, images = method.masks(batch), batch.views["image"]
    seen = encode(images, masks)[0]
    again = encode(torch.where(masks.pixels, 3.0, images), masks)[0]
    assert torch.equal(seen, again)
    other = encode(torch.where(masks.pixels, images, images + 0.1), masks)[0]
    assert not torch.equal(seen, other)


def test_a_part_of_all_tokens_is_the_whole(tmp_path):
    method, batch = made("vit_tiny", tmp_path)
    images = batch.views["image"]
    order = torch.randperm(128).expand(len(images), -1)
    tokens = method.encoder.tokens(images)
    torch.testing.assert_close(method.encoder.part(images, order), tokens[:, order[0]])


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_the_language_half_leaves_a_frozen_encoder_alone(encoder, tmp_path):
    gradients = []
    for fields in ({"language": False}, {}, {"language_frozen": False}):
        method, batch = made(encoder, tmp_path / str(len(gradients)), **fields)
        method(batch).loss.backward()
        gradients.append({n: p.grad for n, p in method.encoder.named_parameters() if p.grad is not None})
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
    assert any(not torch.equal(g, gradients[2][n]) for n, g in gradients[0].items())


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_the_second_stage_trains_the_reader_alone(encoder, tmp_path):
    """Its loss is loss_language of a run of both halves with the same weights; the encoder stays bit for bit."""
    both, batch = made(encoder, tmp_path / "both")
    config = case_config("maskocr", encoder, precision="fp64")
    config.model.image_width = 64
    config.method = dataclasses.replace(config.method, language_only=True)
    trainer = make_trainer(resolve(config), tmp_path / "second")
    method = trainer.method
    names = {name.split(".")[0] for name, p in method.named_parameters() if p.requires_grad}
    assert names == {"reader"} and "train.init" in method.remarks()[0]
    missing = method.load_state_dict(both.state_dict(), strict=False)
    assert not missing.missing_keys and all(n.startswith(("regressor.", "decoder.")) for n in missing.unexpected_keys)
    output = method(batch, pictures=True)
    assert set(output.terms) == {"loss_language"} and set(output.pictures) == {"masked"}
    assert torch.equal(output.loss.detach(), both(batch).terms["loss_language"])
    before = {name: x.clone() for name, x in method.state_dict().items()}
    take(trainer, 2)
    moved = {name.split(".")[0] for name, x in method.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {"reader"}
    assert not method.encoder.training and method.reader.training
    with pytest.raises(ConfigError, match=r"method\.language must be true for method\.language_only"):
        resolve(PretrainConfig(method=settings("maskocr", language_only=True)))


def test_words_without_labels_count_as_zero():
    logits = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    losses = read_losses(logits, torch.tensor([[1, 2, -1], [-1, -1, -1]]), torch.tensor([2, 0]))
    losses.sum().backward()
    assert float(losses[1]) == 0 and not logits.grad[1].any() and not logits.grad[0, 3].any()
    assert logits.grad[0, :3].abs().sum(1).min() > 0


@pytest.mark.parametrize(
    ("ratio", "line"),
    [(0.01, "0.01"), (0.039, "0.039")],
)
def test_one_line(ratio, line):
    config = PretrainConfig(method=settings("maskocr", mask_ratio=ratio))
    with pytest.raises(ConfigError) as caught:
        resolve(config)
    wanted = "method.mask_ratio must hide 1 to 24 of the 25 strips of an image for method maskocr, got "
    assert str(caught.value) == wanted + line
