"""PerSec against loops over positions, rivals and codes, in float64."""

import math

import pytest
import torch

from rcmstr_fast.config import ConfigError, PretrainConfig, resolve
from rcmstr_fast.methods import settings
from rcmstr_fast.methods.parts.context import Quantiser, beyond, gumbel, others, told_apart, unused
from tests.methods.harness import batches, case_config, make_trainer


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def info_nce(context, targets, codes, place, rivals, tau):
    """-log of the own target's share; rivals with the same codes do not count."""
    own = math.exp(cosine(context, targets[place]) / tau)
    against = [math.exp(cosine(context, targets[j]) / tau) for j in rivals if codes[j] != codes[place]]
    return -math.log(own / (own + sum(against)))


def unused_codes(probabilities):
    """1 - the summed perplexity of the books' mean distributions over the number of codes; rows of books of entries."""
    books, entries, total = len(probabilities[0]), len(probabilities[0][0]), 0.0
    for g in range(books):
        mean = [sum(row[g][v] for row in probabilities) / len(probabilities) for v in range(entries)]
        total += math.exp(-sum(p * math.log(p) for p in mean))
    return 1 - total / (books * entries)


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_loss_by_positions(encoder, tmp_path):
    trainer = make_trainer(case_config("persec", encoder, precision="fp64"), tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    batch.progress = torch.tensor(0.5)
    output, own = method(batch), method.own
    with torch.no_grad():
        early, tokens = method.encoder.levels(batch.views["image"], own.stroke_layer)
        maps = {"stroke": early.flatten(2).transpose(1, 2), "semantic": method.encoder.columns(tokens)}
    tau = math.sqrt(own.gumbel_start * own.gumbel_end)  # half way, on a logarithmic scale
    total = 0.0
    for level in ("stroke", "semantic"):
        hidden, rivals, noise = method.draws(level, batch, torch.float64)
        with torch.no_grad():
            made = method.perceivers[level](maps[level], hidden, noise, tau)
        contexts, targets, codes, probabilities = (x.tolist() for x in made)
        losses = [
            info_nce(contexts[b][i], targets[b], codes[b], i, rivals[b, i].tolist(), own.temperature)
            for b in range(len(contexts))
            for i in range(len(contexts[b]))
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


def test_rivals_of_the_same_codes_are_none():
    context, targets = torch.randn(1, 3, 4).double(), torch.randn(1, 3, 4).double()
    rivals = torch.tensor([[[1, 2], [0, 2], [0, 1]]])
    loss, right = told_apart(context, targets, torch.zeros(1, 3, 2, dtype=torch.int64), rivals, 0.1)
    assert loss.abs().max() < 1e-12 and right.all()
    codes = torch.tensor([[[0, 0], [0, 0], [0, 1]]])
    loss, _ = told_apart(context, targets, codes, rivals, 0.1)
    expected = [
        info_nce(context[0, i].tolist(), targets[0].tolist(), codes[0].tolist(), i, rivals[0, i].tolist(), 0.1)
        for i in range(3)
    ]
    assert loss[0].tolist() == pytest.approx(expected)


def test_noise_windows_and_rivals():
    words = torch.randint(0, 2**32, (2, 40_000), generator=torch.Generator().manual_seed(0))
    noise = gumbel(words, torch.float64)
    assert noise.mean() == pytest.approx(0.5772, abs=0.02) and noise.var() == pytest.approx(math.pi**2 / 6, abs=0.05)
    drawn = others(words[:, :60], 6)
    assert drawn.shape == (2, 6, 10) and drawn.min() == 0 and drawn.max() == 5
    assert all(i not in drawn[:, i].tolist()[b] for i in range(6) for b in range(2))
    far = beyond((3, 5), 1)
    for a in range(15):
        for b in range(15):
            assert bool(far[a, b]) == (max(abs(a // 5 - b // 5), abs(a % 5 - b % 5)) > 1)


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_what_is_hidden_does_not_reach_its_context(encoder, tmp_path):
    trainer = make_trainer(case_config("persec", encoder, precision="fp64"), tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    early, tokens = method.encoder.eval().levels(batch.views["image"], 1)
    torch.testing.assert_close(tokens, method.encoder.tokens(batch.views["image"]))
    assert early.shape[2:] == ((32, 36) if encoder == "resnet29" else (8, 8))
    x = torch.randn(8, math.prod(method.sizes["stroke"]), method.perceivers["stroke"].hidden.numel()).double()
    hidden, _, noise = method.draws("stroke", batch, torch.float64)
    contexts, targets, *_ = method.perceivers["stroke"](x, hidden, noise, 1.0)
    changed = x.scatter(1, hidden[:, :, None].expand(-1, -1, x.shape[2]), 3.0)
    again, others_, *_ = method.perceivers["stroke"](changed, hidden, noise, 1.0)
    assert torch.equal(contexts, again) and not torch.equal(targets, others_)


def test_one_code_for_all_shows(tmp_path):
    trainer = make_trainer(case_config("persec", "vit_tiny"), tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    healthy = method(batch).monitors["codes_stroke"]
    with torch.no_grad():
        method.perceivers["stroke"].quantiser.choose.bias.view(2, 8)[:, 0] += 100.0
    assert float(method(batch).monitors["codes_stroke"]) == pytest.approx(1 / 8) and healthy > 0.5
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
    assert not torch.equal(trainer.method.draws("stroke", batch, torch.float32)[2], whole[2][3:5])


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
