"""PerSec against loops over images, positions and codes, in float64."""

import math

import pytest
import torch

from rcmstr_fast.config import ConfigError, PretrainConfig, resolve
from rcmstr_fast.methods import settings
from rcmstr_fast.methods.parts.context import Quantiser, beyond, gumbel, told_apart, unused
from tests.methods.harness import batches, case_config, make_trainer


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def info_nce(contexts, targets, hidden, image, place, tau):
    """-log of the own target's share among the targets that any image has at the position; nested lists."""
    at = hidden[image].index(place)
    there = [b for b in range(len(hidden)) if place in hidden[b]]
    close = {b: math.exp(cosine(contexts[image][at], targets[b][hidden[b].index(place)]) / tau) for b in there}
    return -math.log(close[image] / sum(close.values()))


def unused_codes(probabilities):
    """1 - the summed perplexity of the books' mean distributions over the number of codes; rows of books of entries."""
    books, entries, total = len(probabilities[0]), len(probabilities[0][0]), 0.0
    for g in range(books):
        mean = [sum(row[g][v] for row in probabilities) / len(probabilities) for v in range(entries)]
        total += math.exp(-sum(p * math.log(p) for p in mean))
    return 1 - total / (books * entries)


def rest_of(x):
    """[B][N][C] less the mean of each place over images, then of each image over places; each channel of variance 1."""
    images, places, channels = len(x), len(x[0]), len(x[0][0])
    left = [[[0.0] * channels for _ in range(places)] for _ in range(images)]
    for c in range(channels):
        by_place = [sum(x[b][n][c] for b in range(images)) / images for n in range(places)]
        for b in range(images):
            apart = [x[b][n][c] - by_place[n] for n in range(places)]
            for n in range(places):
                left[b][n][c] = apart[n] - sum(apart) / places
        variance = sum(left[b][n][c] ** 2 for b in range(images) for n in range(places)) / (images * places)
        for b in range(images):
            for n in range(places):
                left[b][n][c] /= math.sqrt(variance + 1e-5)
    return left


def unseen_by_vit(method, hidden):
    """[B, N] bool: the tokens of hidden strokes and of all rows of hidden columns."""
    height, width = method.sizes["stroke"]
    unseen = torch.zeros(len(hidden["stroke"]), height * width, dtype=torch.bool)
    for b in range(len(unseen)):
        for place in hidden["stroke"][b].tolist():
            unseen[b, place] = True
        for column in hidden["semantic"][b].tolist():
            for row in range(height):
                unseen[b, row * width + column] = True
    return unseen


@pytest.mark.parametrize(
    ("encoder", "residual"), [("resnet29", False), ("resnet29", True), ("vit_tiny", True), ("vit_tiny", False)]
)
def test_loss_by_positions(encoder, residual, tmp_path):
    config = case_config("persec", encoder, precision="fp64")
    assert config.method.residual == (encoder == "vit_tiny")
    config.method.residual = residual
    trainer = make_trainer(config, tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    batch.progress = torch.tensor(0.5)
    output, own = method(batch), method.own
    maps = {"stroke": [], "semantic": []}
    drawn = {level: method.draws(level, batch, torch.float64) for level in ("stroke", "semantic")}
    hides = encoder == "vit_tiny"
    unseen = unseen_by_vit(method, {level: hidden for level, (hidden, _) in drawn.items()}) if hides else None
    with torch.no_grad():
        for view in ("one", "two"):
            early, tokens = method.encoder.levels(
                batch.views[view], own.stroke_layer, unseen if view == "one" else None
            )
            maps["stroke"].append(early.flatten(2).transpose(1, 2))
            maps["semantic"].append(method.encoder.columns(tokens))
    tau = math.sqrt(own.gumbel_start * own.gumbel_end)  # half way, on a logarithmic scale
    total = 0.0
    for level in ("stroke", "semantic"):
        hidden, noise = drawn[level]
        with torch.no_grad():
            contexts = method.perceivers[level](maps[level][0], hidden).tolist()
            told_of = maps[level][1]
            if residual:
                told_of = torch.tensor(rest_of(told_of.tolist()), dtype=torch.float64)
            made = method.perceivers[level].targets(told_of, hidden, noise, tau)
        targets, _, probabilities = (x.tolist() for x in made)
        places = hidden.tolist()
        losses = [
            info_nce(contexts, targets, places, b, place, own.temperature)
            for b in range(len(places))
            for place in places[b]
        ]
        spare = unused_codes([row for image in probabilities for row in image])
        assert float(output.terms[f"loss_{level}"]) == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert float(output.terms[f"loss_{level}_codes"]) == pytest.approx(spare, rel=1e-6)
        total += sum(losses) / len(losses) + own.diversity_weight * spare
    assert float(output.loss.detach()) == pytest.approx(total, rel=1e-6)


def test_the_quantiser_by_entries():
    torch.manual_seed(0)
    quantiser = Quantiser(6, 2, 4, 10).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    noise = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    rows, codes, probabilities = quantiser(x, noise, 0.7)
    logits = quantiser.choose(x).unflatten(2, (2, 4))
    for b in range(3):
        for m in range(5):
            joined = []
            for g in range(2):
                scores = (logits[b, m, g] + noise[b, m, g]).tolist()
                assert int(codes[b, m, g]) == scores.index(max(scores))
                joined += quantiser.books[g, codes[b, m, g]].tolist()
            wanted = quantiser.mix(torch.tensor(joined, dtype=torch.float64))
            torch.testing.assert_close(rows[b, m], wanted)
    torch.testing.assert_close(probabilities, logits.softmax(-1))


def test_the_gradient_of_a_choice_is_that_of_its_softmax():
    torch.manual_seed(0)
    quantiser = Quantiser(6, 2, 4, 10).double()
    x, noise = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 2, 4, dtype=torch.float64)
    weight = torch.randn(2, 3, 10, dtype=torch.float64)
    (quantiser(x, noise, 0.7)[0] * weight).sum().backward()
    got = quantiser.choose.weight.grad.clone()
    quantiser.zero_grad()
    soft = ((quantiser.choose(x).unflatten(2, (2, 4)) + noise) / 0.7).softmax(-1)
    rows = torch.cat([soft[:, :, g] @ quantiser.books[g].detach() for g in range(2)], dim=2)
    (quantiser.mix(rows) * weight).sum().backward()
    torch.testing.assert_close(got, quantiser.choose.weight.grad)


def test_rivals_are_at_the_same_position_of_all_processes_images():
    hidden = torch.tensor([[2, 0], [0, 1], [3, 2]])
    torch.manual_seed(0)
    contexts, targets = torch.randn(3, 2, 4).double(), torch.randn(3, 2, 4).double()
    expected = [
        [info_nce(contexts.tolist(), targets.tolist(), hidden.tolist(), b, p, 0.1) for p in hidden[b].tolist()]
        for b in range(3)
    ]
    assert expected[1][1] == expected[2][0] == 0.0  # nobody else hides it
    for first in (0, 1):  # all images, and those of a second process
        own = slice(first, 3)
        loss, right = told_apart(contexts[own], hidden[own], targets, hidden, first=first, size=4, temperature=0.1)
        torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64)[own])
        assert torch.equal(right, loss < math.log(2))  # of two candidates the own one is the closer


def test_a_code_for_the_position_does_not_help():
    hidden = torch.arange(4).repeat(6, 1)
    place = torch.eye(4).repeat(6, 1, 1).double()  # each position has its own vector, in every image the same
    loss, right = told_apart(place, hidden, place, hidden, first=0, size=4, temperature=0.1)
    torch.testing.assert_close(loss, torch.full((6, 4), math.log(6)).double())
    assert right.double().mean() <= 1 / 6


def test_noise_and_windows():
    words = torch.randint(0, 2**32, (2, 40_000), generator=torch.Generator().manual_seed(0))
    noise = gumbel(words, torch.float64)
    assert noise.mean() == pytest.approx(0.5772, abs=0.02) and noise.var() == pytest.approx(math.pi**2 / 6, abs=0.05)
    far = beyond((3, 5), 1)
    for a in range(15):
        for b in range(15):
            assert bool(far[a, b]) == (max(abs(a // 5 - b // 5), abs(a % 5 - b % 5)) > 1)


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_what_is_hidden_does_not_reach_its_context(encoder, tmp_path):
    trainer = make_trainer(case_config("persec", encoder, precision="fp64"), tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    early, tokens = method.encoder.eval().levels(batch.views["one"], 1)
    torch.testing.assert_close(tokens, method.encoder.tokens(batch.views["one"]))
    assert early.shape[2:] == ((32, 36) if encoder == "resnet29" else (8, 8))
    x = torch.randn(8, math.prod(method.sizes["stroke"]), method.perceivers["stroke"].hidden.numel()).double()
    hidden, noise = method.draws("stroke", batch, torch.float64)
    perceiver = method.perceivers["stroke"]
    changed = x.scatter(1, hidden[:, :, None].expand(-1, -1, x.shape[2]), 3.0)
    assert torch.equal(perceiver(x, hidden), perceiver(changed, hidden))
    assert not torch.equal(*(perceiver.targets(y, hidden, noise, 1.0)[0] for y in (x, changed)))


def test_a_vit_tells_nothing_by_pixels_that_are_hidden(tmp_path):
    trainer = make_trainer(case_config("persec", "vit_tiny", precision="fp64"), tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    unseen = unseen_by_vit(method, {level: method.draws(level, batch, torch.float64)[0] for level in method.sizes})
    assert 0.3 < unseen.double().mean() < 0.8
    pixels = unseen.view(-1, 1, 8, unseen.shape[1] // 8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    before = method(batch).loss.detach()
    batch.views["one"] = batch.views["one"] + pixels * 3.0
    torch.testing.assert_close(method(batch).loss.detach(), before)
    batch.views["one"] = batch.views["one"] + ~pixels * 3.0
    assert abs(float(method(batch).loss.detach() - before)) > 1e-6


def test_one_code_for_all_shows(tmp_path):
    trainer = make_trainer(case_config("persec", "vit_tiny"), tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    healthy = method(batch).monitors["codes_stroke"]
    with torch.no_grad():
        method.perceivers["stroke"].quantiser.choose.bias.view(2, 8)[:, 0] += 100.0
    assert float(method(batch).monitors["codes_stroke"]) == pytest.approx(1 / 8) and healthy > 0.3
    one = torch.zeros(2, 8)
    one[:, 3] = 1
    assert float(unused(one)) == pytest.approx(7 / 8) and float(unused(torch.full((2, 8), 1 / 8))) == pytest.approx(
        0, abs=1e-6
    )


def test_noise_goes_with_seed_epoch_and_index(tmp_path):
    trainer = make_trainer(case_config("persec", "resnet29"), tmp_path)
    batch = batches(trainer, 0)[0]
    whole = trainer.method.draws("stroke", batch, torch.float32)
    batch.index = batch.index[3:5]
    for a, b in zip(whole, trainer.method.draws("stroke", batch, torch.float32), strict=True):
        assert torch.equal(a[3:5], b)
    batch.epoch = torch.tensor(1)
    assert not torch.equal(trainer.method.draws("stroke", batch, torch.float32)[1], whole[1][3:5])


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"stroke_layer": 7},
            "method.stroke_layer must be at most the 6 layers of the encoder for method persec, got 7",
        ),
        ({"groups": 3}, "method.groups must divide model.feature_dim 128 for method persec, got 3"),
        (
            {"mask_ratio": 0.05},
            "method.mask_ratio must hide 2 or more of the 26 frames of an image for method persec, got 0.05",
        ),
    ],
)
def test_one_line(fields, line):
    with pytest.raises(ConfigError) as caught:
        resolve(PretrainConfig(method=settings("persec", **fields)))
    assert str(caught.value) == line
