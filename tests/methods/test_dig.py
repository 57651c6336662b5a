"""DiG against its formulas in float64 NumPy; what it masks, moves and leaves out."""

import numpy as np
import pytest
import torch

from rcmstr_fast.config import PretrainConfig, resolve
from rcmstr_fast.methods import settings
from tests.methods.harness import batches, case_config, make_trainer
from tests.oracles.heads import mlp, unit, weights, windows
from tests.oracles.in_batch import cross_entropy, pixel_loss


@pytest.fixture
def made(tmp_path):
    """Method with a momentum network of its own weights, and a batch."""
    trainer = make_trainer(case_config("dig", "vit_tiny", precision="fp64"), tmp_path)
    with torch.no_grad():
        for p in trainer.method.momentum.parameters():
            p.mul_(0.9)
    return trainer.method, batches(trainer, 0)[0]


def rows(network, frames, predictor=None):
    """Unit rows of the windows, [B * 2, D]."""
    pooled = np.stack([windows(x, 2) for x in frames])
    out = mlp(pooled, weights(network.projector), "layers.", "LNRLNRLN", 2)
    if predictor is not None:
        out = mlp(out, weights(predictor), "", "LNRLN", 2)
    return unit(out).reshape(-1, out.shape[2])


def test_loss_is_the_formula(made):
    method, batch = made
    masks = method.mim.masks(batch)
    sides = {}
    with torch.no_grad():
        for name, network in (("online", method.online), ("key", method.momentum.network)):
            tokens = network.encoder.forward_masked(batch.views["plain"], masks, "anchored")[0]
            plain = tokens.unflatten(1, network.encoder.grid).mean(1).numpy()
            sides[name] = plain, network.encoder(batch.views["augmented"]).numpy()
            if name == "online":
                prediction = method.mim.head(tokens).numpy()
    queries = [rows(method.online, x, method.predictor) for x in sides["online"]]
    keys = [rows(method.momentum.network, x) for x in sides["key"]]
    contrast = 0.0
    for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
        contrast += 2 * 0.2 * np.mean([cross_entropy(row, k, i, 0.2) for i, row in enumerate(q)])
    target = batch.images.permute(0, 3, 1, 2).double().numpy() / 255
    mim = pixel_loss(prediction, target, masks.pixels.numpy())
    output = method(batch)
    assert float(output.terms["loss_contrast"]) == pytest.approx(contrast, rel=1e-6)
    assert float(output.terms["loss_mim"]) == pytest.approx(mim, rel=1e-5)
    assert float(output.loss.detach()) == pytest.approx(mim + 0.1 * contrast, rel=1e-5)


def test_label_smoothing_spreads_a_share_over_all_candidates(made):
    method, batch = made
    generator = torch.Generator().manual_seed(0)
    query, key = (unit(torch.randn(16, 6, generator=generator, dtype=torch.float64).numpy()) for _ in range(2))
    expected = 0.0
    for i, row in enumerate(query):
        logits = key @ row / 0.2
        logs = logits - np.log(np.exp(logits).sum())
        target = np.full(16, 0.1 / 16)
        target[i] += 0.9
        expected -= 2 * 0.2 * float(target @ logs) / 16
    method.settings.label_smoothing = 0.1
    q, k = torch.from_numpy(query).requires_grad_(), torch.from_numpy(key)
    found = method._info_nce(q, k)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-12)
    logits = q @ k.T / 0.2
    torchs = torch.nn.functional.cross_entropy(logits, torch.arange(16), label_smoothing=0.1)
    torch.testing.assert_close(*(torch.autograd.grad(x, q)[0] for x in (found, 2 * 0.2 * torchs)))
    method(batch).loss.backward()


def test_only_the_online_side_learns(made):
    method, batch = made
    method(batch).loss.backward()
    assert all(p.grad is None for p in method.momentum.parameters())
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_hidden_pixels_reach_neither_side(made):
    method, batch = made
    before = method(batch).terms["loss_contrast"]
    hidden = method.mim.masks(batch).pixels
    batch.views["plain"] = batch.views["plain"].masked_fill(hidden, 7.0)
    assert torch.equal(method(batch).terms["loss_contrast"], before)


def test_sizes_of_the_paper():
    config = resolve(
        PretrainConfig(method=settings("dig"), model=PretrainConfig().model.__class__(encoder="vit_small"))
    )
    own, optim = config.method, config.optim
    assert (own.momentum, own.momentum_ramp, own.temperature, own.windows, own.mask_ratio, own.num_blocks) == (
        0.99,
        "cosine",
        0.2,
        4,
        0.7,
        0,
    )
    assert (
        config.model.final_norm is False and config.model.projector_hidden == 4096 and config.model.feature_dim == 256
    )
    assert (optim.name, optim.weight_decay, optim.min_lr, config.train.epochs) == ("adamw", 0.1, 1e-5, 10)
    assert optim.lr == pytest.approx(1.5e-4 * 1024 / 256)
