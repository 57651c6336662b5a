"""SimAN against loops over frames, pixels and patches, in float64."""

import math

import pytest
import torch

from rcmstr_fast.config import ConfigError, PretrainConfig, resolve
from rcmstr_fast.methods import settings
from rcmstr_fast.methods.parts.painting import EPS, restyled
from rcmstr_fast.methods.siman import SimAN, columns
from rcmstr_fast.train.optim import RATE, build_optimizer
from tests.methods.harness import batches, case_config, make_trainer


def moments(values, weights=None):
    """Mean and deviation, weighted."""
    weights = weights or [1 / len(values)] * len(values)
    mean = sum(w * v for w, v in zip(weights, values, strict=True))
    return mean, math.sqrt(max(0.0, sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))) + EPS)


def plain(frames):
    """Rows of frames, each channel with mean 0 and deviation 1."""
    of = [moments(channel) for channel in zip(*frames, strict=True)]
    return [[(x - mean) / deviation for x, (mean, deviation) in zip(frame, of, strict=True)] for frame in frames]


def test_style_by_frames():
    generator = torch.Generator().manual_seed(0)
    content = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    neighbour = 2 * torch.randn(2, 6, 7, dtype=torch.float64, generator=generator) + 3
    got, attention = restyled(content, neighbour)
    for b in range(2):
        own, keys, frames = plain(content[b].tolist()), plain(neighbour[b].tolist()), neighbour[b].tolist()
        for t in range(5):
            shares = [math.exp(sum(x * y for x, y in zip(own[t], key, strict=True)) / math.sqrt(7)) for key in keys]
            shares = [x / sum(shares) for x in shares]
            assert attention[b, t].tolist() == pytest.approx(shares)
            for c in range(7):
                mean, deviation = moments([frame[c] for frame in frames], shares)
                assert float(got[b, t, c]) == pytest.approx(deviation * own[t][c] + mean, rel=1e-9)


def test_loss_by_pixels_and_patches(tmp_path):
    trainer = make_trainer(case_config("siman", "resnet29", precision="fp64"), tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    output, own = method(batch), method.own
    crops = {}
    for name, view, at in (
        ("one", "changed", "painted"),
        ("true", "plain", "painted"),
        ("other", "plain", "neighbour"),
    ):
        starts = batch.drawn[at].tolist()
        crops[name] = torch.stack([x[:, :, s : s + own.crop] for x, s in zip(batch.views[view], starts, strict=True)])
    with torch.no_grad():
        frames = [method.encoder(crops[name]) for name in ("one", "other")]
        painted = method.painter(restyled(*frames)[0])
        true, false = (method.discriminator(x).flatten().tolist() for x in (crops["true"], painted))
    pairs = list(zip(painted.flatten().tolist(), crops["true"].flatten().tolist(), strict=True))
    error = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
    judged = sum(max(0.0, 1 - x) for x in true) / len(true) + sum(max(0.0, 1 + x) for x in false) / len(false)
    assert float(output.terms["loss_painted"]) == pytest.approx(error, rel=1e-9)
    assert float(output.terms["loss_discriminator"]) == pytest.approx(judged, rel=1e-9)
    total = error - own.adversarial_weight * sum(false) / len(false) + judged
    assert float(output.loss.detach()) == pytest.approx(total, rel=1e-9)


def test_each_player_learns_from_its_own_loss(tmp_path):
    trainer = make_trainer(case_config("siman", "resnet29", precision="fp64"), tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    method(batch).loss.backward()
    both = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    crops = [
        columns(batch.views[v], batch.drawn[at], method.own.crop)
        for v, at in (("changed", "painted"), ("plain", "neighbour"), ("plain", "painted"))
    ]
    painted = method.painter(restyled(*method.frames(*crops[:2]))[0])
    scores = method.discriminator(painted)
    ((painted - crops[2]).square().mean() - method.own.adversarial_weight * scores.mean()).backward()
    for name, p in method.named_parameters():
        if name.startswith(("encoder.", "painter.")) and p.grad is not None:
            torch.testing.assert_close(both[name], p.grad, msg=name)
    method.zero_grad()
    judged = (
        torch.relu(1 - method.discriminator(crops[2])).mean()
        + torch.relu(1 + method.discriminator(painted.detach())).mean()
    )
    judged.backward()
    for name, p in method.discriminator.named_parameters():
        torch.testing.assert_close(both[f"discriminator.{name}"], p.grad)
    groups = build_optimizer(method, trainer.config.optim).param_groups
    assert {group.get(RATE) for group in groups} == {None, method.own.discriminator_rate}


def test_crops_are_neighbours_inside_the_word():
    config = case_config("siman", "resnet29")
    config.method.crop, index = 12, torch.arange(2000)
    drawn = SimAN.draw(config, index, 0)
    gap = drawn["painted"] - drawn["neighbour"]
    assert set(gap.tolist()) == {-12, 12} and 900 < int((gap > 0).sum()) < 1100
    starts = torch.minimum(drawn["painted"], drawn["neighbour"])
    assert set(starts.tolist()) == set(range(36 - 24 + 1))


def test_a_grey_picture_shows(tmp_path):
    trainer = make_trainer(case_config("siman", "resnet29"), tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    healthy = method(batch).monitors["detail"]
    with torch.no_grad():
        for parameter in method.painter.leave.parameters():
            parameter.zero_()
    assert float(method(batch).monitors["detail"]) < 1e-6 < float(healthy)


@pytest.mark.parametrize(
    ("part", "field", "value", "line"),
    [
        (
            "method",
            "crop",
            52,
            "method.crop must be a multiple of 4 and at most half of model.image_width 100 for method siman, got 52",
        ),
        (
            "model",
            "tps",
            "trainable",
            "model.tps must be none for method siman (the augmented crop must show what the plain one "
            "shows), got 'trainable'",
        ),
        ("model", "encoder", "vit_tiny", "model.encoder must be one of resnet29 for method siman, got vit_tiny"),
    ],
)
def test_one_line(part, field, value, line):
    config = PretrainConfig(method=settings("siman"))
    setattr(getattr(config, part), field, value)
    with pytest.raises(ConfigError) as caught:
        resolve(config)
    assert str(caught.value) == line
