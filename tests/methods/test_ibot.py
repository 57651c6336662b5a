"""iBOT against its formulas in float64 NumPy: scores, centres, temperatures, both losses; block masks; multi-crop."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from rcmstr_fast import ops
from rcmstr_fast.config import resolve
from rcmstr_fast.methods.parts.blocks import block_masks
from rcmstr_fast.models.vit import drop_paths
from tests.methods.harness import batches, case_config, make_trainer
from tests.oracles.heads import mlp, unit, weights


def made(folder, class_token=True, **fields):
    """Float64 trainer whose teacher and centres are unlike the student's, and a batch."""
    config = case_config("ibot", "vit_tiny", precision="fp64")
    config.model.class_token = class_token
    config.method = dataclasses.replace(config.method, **fields)
    trainer = make_trainer(resolve(config), folder)
    method = trainer.method
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.mul_(0.9)
        method.centres["global"].mean.copy_(torch.linspace(-0.1, 0.1, 12))
        method.centres["patch"].mean.copy_(torch.linspace(0.2, -0.2, 12))
    batch = batches(trainer, 0)[0]
    batch.progress = torch.tensor(0.15, dtype=torch.float64)
    return trainer, batch


def scores(network, tokens):
    w = weights(network.head)
    return unit(mlp(tokens, w, "layers.", "LGLGL")) @ unit(w["prototypes"]).T


def both(network, images, masks):
    """Scores of global and patch tokens."""
    with torch.no_grad():
        found = network.encoder.features(images, masks)
    tokens = found.tokens.numpy()
    whole = tokens.mean(1) if found.class_token is None else found.class_token.numpy()
    return scores(network, whole), scores(network, tokens)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("crops", [0, 2])
def test_losses_are_the_formulas(class_token, crops, tmp_path):
    trainer, batch = made(tmp_path, class_token, local_crops=crops)
    method, grids = trainer.method, batch.drawn["masks"]
    student, teacher = [], []
    for v, name in enumerate(("one", "two")):
        hidden = grids[:, v].repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
        student.append(both(method.student, batch.views[name], ops.Masks(grids[:, v], hidden)))
        teacher.append(both(method.teacher.network, batch.views[name], None))
    guesses = [x[0] for x in student]
    for i in range(crops):
        with torch.no_grad():
            found = method.student.encoder.crop_features(batch.views[f"local{i}"])
        whole = found.class_token if class_token else found.tokens.mean(1)
        guesses.append(scores(method.student, whole.numpy()))
    centre = {name: part.mean.numpy().copy() for name, part in method.centres.items()}
    tau_patch = 0.04 + (0.07 - 0.04) * 0.5  # half of the rise, which takes 0.3 of the run
    across, within = [], []
    for q in range(2):
        for v, guess in enumerate(guesses):
            for b in range(len(guess)):
                if v != q:
                    p = softmax((teacher[q][0][b] - centre["global"]) / 0.04)
                    across.append(-float(p @ log_softmax(guess[b] / 0.1)))
        for b, grid in enumerate(grids[:, q].flatten(1).numpy()):
            found = []
            for t in np.nonzero(grid)[0]:
                p = softmax((teacher[q][1][b, t] - centre["patch"]) / tau_patch)
                found.append(-float(p @ log_softmax(student[q][1][b, t] / 0.1)))
            within.append(np.mean(found))
    output = method(batch)
    assert float(output.terms["loss_global"]) == pytest.approx(np.mean(across), rel=1e-6)
    assert float(output.terms["loss_patch"]) == pytest.approx(np.mean(within), rel=1e-6)
    assert float(output.loss.detach()) == pytest.approx(np.mean(across) + np.mean(within), rel=1e-6)

    method.end_step(torch.tensor(False))
    for name, part in method.centres.items():
        assert np.array_equal(part.mean.numpy(), centre[name])
    method.begin_step()
    with torch.no_grad():
        fresh = {v: both(method.teacher.network, batch.views[v], None) for v in ("one", "two")}
    method(batch)
    method.end_step(torch.tensor(True))
    for place, name in enumerate(("global", "patch")):
        seen = np.concatenate([fresh[v][place].reshape(-1, 12) for v in ("one", "two")]).mean(0)
        expected = 0.9 * centre[name] + 0.1 * seen
        np.testing.assert_allclose(method.centres[name].mean.numpy(), expected, rtol=1e-6, atol=1e-9)


def by_branches(encoder, images, grid, paths):
    """Tokens of one image, block by block: a branch is added where its factor is not 0, and grown by that factor."""
    hidden = grid.repeat_interleave(4, 0).repeat_interleave(4, 1)[None, None]
    x = encoder.patch_embed(torch.where(hidden, 0.0, images[None]))
    x = torch.where(grid.flatten()[None, :, None], encoder.mask_token, x) + encoder.pos_embed
    x = torch.cat([encoder.cls_token, x], 1)
    for block, (attention, mixing) in zip(encoder.blocks, paths.tolist(), strict=True):
        x = x + attention * block.attn(block.norm1(x)) if attention else x
        x = x + mixing * block.mlp(block.norm2(x)) if mlp else x
    return encoder.norm(x)[0, 0]


def test_branches_are_left_out_by_image_and_view(tmp_path):
    trainer, batch = made(tmp_path, drop_path=0.6, local_crops=1)
    trainer.config.model.depth = 3
    trainer = make_trainer(trainer.config, tmp_path / "three")
    method, encoder = trainer.method, trainer.method.student.encoder
    batch = batches(trainer, 0)[0]
    paths, grids = batch.drawn["paths"], batch.drawn["masks"]
    assert paths.shape == (8, 3, 3, 2) and (paths == 0).any() and (paths[:, :, 0] == 1).all()
    seen = {}
    whole = encoder.features

    def features(images, masks, paths=None):
        seen["found"] = whole(images, masks, paths=paths)
        return seen["found"]

    encoder.features = features
    method(batch).loss.backward()
    with torch.no_grad():
        for row in (0, 3, 9, 15):
            view, image = divmod(row, 8)
            wanted = by_branches(
                encoder, batch.views[("one", "two")[view]][image], grids[image, view], paths[image, view]
            )
            torch.testing.assert_close(seen["found"].class_token[row], wanted)
    other = drop_paths(torch.arange(4000), seed=1, epoch=2, views=1, depth=3, rate=0.6)
    for block, chance in enumerate((0.0, 0.3, 0.6)):
        values = other[:, 0, block]
        assert float((values == 0).float().mean()) == pytest.approx(chance, abs=0.02)
        assert values[values > 0].unique().tolist() == pytest.approx([1 / (1 - chance)])
        assert float(values.mean()) == pytest.approx(1, abs=0.05)
    part = drop_paths(torch.arange(7, 9), seed=1, epoch=2, views=1, depth=3, rate=0.6)
    assert torch.equal(part, other[7:9])


def test_the_last_layer_waits(tmp_path):
    trainer, batch = made(tmp_path)
    method, last = trainer.method, trainer.method.student.head.prototypes
    for epoch, waits in ((0, True), (1, False), (torch.tensor(0), True), (torch.tensor(1), False)):
        batch.epoch, last.grad = epoch, None
        method(batch).loss.backward()
        assert (last.grad.abs().sum() == 0) == waits
    assert all(p.grad is None for p in method.teacher.parameters())


@pytest.mark.parametrize(
    ("kept", "network"), [("teacher", lambda m: m.teacher.network), ("student", lambda m: m.student)]
)
def test_what_is_kept(kept, network, tmp_path):
    method = made(tmp_path, kept=kept)[0].method
    assert method.exported()["encoder"] is network(method).encoder


def test_temperature_rises_and_stays(tmp_path):
    method = made(tmp_path)[0].method
    found = [float(method._tau_patch(torch.tensor(p, dtype=torch.float64))) for p in (0.0, 0.1, 0.3, 0.9)]
    assert found == pytest.approx([0.04, 0.05, 0.07, 0.07])


@pytest.mark.parametrize("grid", [(8, 32), (8, 8)])
def test_block_masks(grid):
    index = torch.arange(64)
    masks = block_masks(index, seed=3, epoch=1, grid=grid, ratio=0.3)
    assert masks.shape == (64, 2, *grid)
    hidden, target = masks.sum((2, 3)), int(0.3 * grid[0] * grid[1])
    assert hidden.max() <= target and hidden.min() >= 1 and hidden.double().mean() > 0.85 * target
    assert torch.equal(masks[10:20], block_masks(index[10:20], seed=3, epoch=1, grid=grid, ratio=0.3))
    assert not torch.equal(masks, block_masks(index, seed=3, epoch=2, grid=grid, ratio=0.3))
    assert not torch.equal(masks[:, 0], masks[:, 1])
    # neighbours are hidden together far oftener than tokens chosen one by one would be
    together = (masks[..., 1:] & masks[..., :-1]).double().sum() / masks[..., :-1].double().sum()
    assert together > 0.55 and math.isfinite(together)


def test_views_are_not_flipped_and_small_crops_have_half_the_size(tmp_path):
    trainer, batch = made(tmp_path, local_crops=2)
    specs = trainer.method.views(trainer.config)
    assert [spec.name for spec in specs] == ["one", "two", "local0", "local1"]
    assert batch.views["local0"].shape[2:] == (16, 16) and not torch.equal(batch.views["local0"], batch.views["local1"])
    assert "flip" not in specs[2].preset.names
    assert trainer.method(batch, pictures=True).pictures.keys() == {"one masked", "two masked"}
