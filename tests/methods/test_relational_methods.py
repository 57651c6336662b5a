"""SeqMoCo, RCLSTR and RCMSTR against their equations in float64 NumPy: strips, windows, rows and pairs one by one."""

import numpy as np
import pytest
import torch

from tests.methods.harness import batches, case_config, make_trainer
from tests.oracles import relations
from tests.oracles.heads import linear, mlp, unit, weights, windows
from tests.oracles.in_batch import pixel_loss
from tests.oracles.strips import permute

S, TAU_INFO, TAU_KL, ALPHA = 4, 0.07, 0.04, 0.3
GROUP = 2


def put_back(frames: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Projected frames [B, T, P] of permuted images to the images that their strips came from."""
    out, places = np.empty_like(frames), order.shape[1]
    part = frames.shape[1] // places
    for b in range(order.shape[0]):
        for n in range(places):
            image, strip = divmod(int(order[b, n]), places)
            out[image, strip * part : (strip + 1) * part] = frames[b, n * part : (n + 1) * part]
    return out


def rows(network, frames: np.ndarray) -> dict[str, np.ndarray]:
    """level -> unit rows [B, n, D]."""
    pooled = {
        "frame": frames,
        "subword": np.stack([windows(x, S) for x in frames]),
        "word": np.stack([windows(x, 1) for x in frames]),
    }
    found = {}
    for level, predictor in network.predictors.items():
        w = weights(predictor)
        plain = "linear.weight" in w
        x = linear(pooled[level], w, "linear") if plain else mlp(pooled[level], w, "layers.", "LNRLNRLN", GROUP)
        found[level] = unit(x)
    return found


def flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[2])


def between(low: np.ndarray, high: np.ndarray, queue: np.ndarray, parts: list[range]) -> float:
    """Eq. 6: the mean over all pairs (low row, high row) of all images."""
    pairs = [
        relations.symmetric_kl(of_low[t : t + 1], of_high[s : s + 1], queue, TAU_KL)
        for of_low, of_high in zip(low, high, strict=True)
        for s, part in enumerate(parts)
        for t in part
    ]
    return float(np.mean(pairs))


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
@pytest.mark.parametrize("name", ["seqmoco", "rclstr", "rcmstr"])
def test_loss_is_the_sum_of_its_equations(name, encoder, tmp_path):
    trainer = make_trainer(case_config(name, encoder, precision="fp64"), tmp_path)
    method, batch = trainer.method, batches(trainer, 0)[0]
    with torch.no_grad():
        for p in method.momentum.parameters():
            p.mul_(0.9)
        online, momentum = method.online, method.momentum.network
        query, key = batch.views["query"], batch.views["key"]
        sides = [online.frames(query).numpy()]
        if name != "seqmoco":
            order = batch.drawn["order"].numpy()
            shuffled = torch.from_numpy(permute(query.numpy(), order))
            sides.append(put_back(online.frames(shuffled).numpy(), order))
        keys = rows(momentum, momentum.frames(key).numpy())
    queries = [rows(online, x) for x in sides]
    queues = {level: queue.rows.numpy() for level, queue in method.queues.items()}
    expected = 0.0
    for level in ("subword",) if name == "seqmoco" else ("frame", "subword", "word"):
        terms = [
            relations.info_nce(flat(q[level]), flat(keys[level]), queues[level], TAU_INFO)
            + ALPHA * relations.symmetric_kl(flat(q[level]), flat(keys[level]), queues[level], TAU_KL)
            for q in queries
        ]
        expected += float(np.mean(terms))
    if name != "seqmoco":
        count = sides[0].shape[1]
        stride = count // S
        strided = [range(s * stride, s * stride + count - (S - 1) * stride) for s in range(S)]
        plain = queries[0]
        expected += between(plain["frame"], keys["subword"], queues["subword"], strided)
        expected += between(plain["subword"], keys["word"], queues["word"], [range(S)])
    if name == "rcmstr":
        masks = method.mim.masks(batch)
        with torch.no_grad():
            prediction = method.mim.head(*online.encoder.forward_masked(query, masks, "anchored")).numpy()
        target = query.numpy() * 0.5 + 0.5
        expected = pixel_loss(prediction, target, masks.pixels.numpy()) + 0.1 * expected
    assert float(method(batch).loss.detach()) == pytest.approx(expected, rel=1e-8)
