"""The supervised baseline against every path and every character, one at a time, in float64."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from rcmstr_fast.config import ConfigError, PretrainConfig, resolve
from rcmstr_fast.methods import settings
from rcmstr_fast.methods.parts.ctc import ctc_losses, spellable
from rcmstr_fast.models.decoders import DECODERS
from tests.methods.harness import batches, case_config, make_trainer


def paths_loss(probabilities, word):
    """-log of the summed probability of all sequences of classes that collapse to the word, a character."""
    total = 0.0
    for path in itertools.product(range(len(probabilities[0])), repeat=len(probabilities)):
        merged = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
        if [c for c in merged if c] == word:
            total += math.prod(row[c] for row, c in zip(probabilities, path, strict=True))
    return -math.log(total) / len(word) if total and word else 0.0


def test_ctc_counts_every_path():
    words = [[1, 2], [2, 2], [1], [1, 1, 2], [2, 1, 2, 1], [1, 1, 1], []]
    logits = torch.randn(len(words), 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([len(word) for word in words])
    targets = torch.tensor([word + [0] * (4 - len(word)) for word in words])
    expected = [paths_loss(p, word) for p, word in zip(logits.softmax(2).tolist(), words, strict=True)]
    assert expected[5] == expected[6] == 0 and all(x > 0 for x in expected[:5])
    assert ctc_losses(logits, targets, lengths).tolist() == pytest.approx(expected, rel=1e-12)
    assert spellable(targets, lengths, 4).tolist() == [True] * 5 + [False] * 2


def test_ctc_has_the_gradient_of_torch():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 12, 7, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.randint(1, 4, (5, 6), generator=generator)  # few classes: doubled characters
    lengths = torch.tensor([6, 3, 1, 5, 0])
    ours = torch.autograd.grad(ctc_losses(logits, targets, lengths).sum(), logits)[0]
    log_probs = F.log_softmax(logits, 2).transpose(0, 1)
    theirs = F.ctc_loss(log_probs, targets, torch.full((5,), 12), lengths, reduction="none", zero_infinity=True)
    wanted = (theirs[:4] / lengths[:4]).sum()
    torch.testing.assert_close(ours, torch.autograd.grad(wanted, logits)[0])


@pytest.mark.parametrize(
    ("encoder", "decoder"), [("resnet29", "ctc"), ("resnet29", "attention"), ("vit_tiny", "transformer")]
)
def test_loss_by_characters(encoder, decoder, tmp_path):
    config = case_config("supervised", encoder, precision="fp64")
    config.method = dataclasses.replace(config.method, decoder=decoder)
    trainer = make_trainer(resolve(config), tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    output = method(batch)
    with torch.no_grad():
        memory = (
            method.encoder.tokens(batch.views["image"])
            if decoder == "transformer"
            else method.encoder(batch.views["image"])
        )
    losses = []
    for frames, ids, length in zip(memory, batch.drawn["targets"], batch.drawn["lengths"].tolist(), strict=True):
        word = [int(i) + DECODERS[decoder].num_special for i in ids[:length]]
        if not word:
            losses.append(0.0)
        elif decoder == "ctc":
            logits = method.decoder(frames[None]).log_softmax(2).transpose(0, 1).detach()
            given = torch.tensor([word])
            losses.append(
                float(F.ctc_loss(logits, given, torch.tensor([len(logits)]), torch.tensor([length]), reduction="sum"))
                / length
            )
        else:
            state, before, terms = method.decoder.start(frames[None]), 0, []
            for wanted in [*word, 1]:  # [SOS] is 0, [EOS] is 1
                logits, state = method.decoder.step(torch.tensor([before]), state)
                terms.append(-float(logits[0].log_softmax(0)[wanted]))
                before = wanted
            losses.append(sum(terms) / len(terms))
    assert losses.count(0.0) == 1
    assert float(output.loss) == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert float(output.monitors["labelled"]) == pytest.approx(1 - 1 / len(losses))


def test_without_labels_nothing_is_learned(tmp_path):
    trainer = make_trainer(case_config("supervised", "resnet29", precision="fp64"), tmp_path)
    batch = batches(trainer, 0)[0]
    batch.drawn["targets"].fill_(-1)
    batch.drawn["lengths"].zero_()
    output = trainer.method(batch)
    output.loss.backward()
    assert float(output.loss) == 0 and float(output.monitors["accuracy"]) == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.method.parameters())


def test_accuracy_is_what_is_read(tmp_path):
    trainer = make_trainer(case_config("supervised", "resnet29"), tmp_path)
    batch = batches(trainer, 0)[0]
    ids, _ = trainer.method.decoder.greedy(trainer.method.encoder(batch.views["image"]))
    read = [[int(i) for i in row if i] for row in ids]
    batch.drawn["lengths"] = torch.tensor([min(len(word), 6) for word in read])
    batch.drawn["targets"] = torch.tensor([[i - 1 for i in (word + [0] * 6)[:6]] for word in read])
    expected = sum(0 < len(word) <= 6 for word in read) / max(1, sum(len(word) > 0 for word in read))
    assert float(trainer.method(batch).monitors["accuracy"]) == pytest.approx(expected)


def test_a_decoder_that_is_not():
    config = PretrainConfig(method=settings("supervised", decoder="parrot"))
    with pytest.raises(ConfigError, match=r"method.decoder must be one of ctc, .* for method supervised, got 'parrot'"):
        resolve(config)
