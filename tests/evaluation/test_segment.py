"""Segmentation on small made-up pictures: data that cannot be used, the metric, a run, its continuation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from rcmstr_fast.config import ConfigError, ModelConfig, RunError
from rcmstr_fast.evaluation.fit import Fit
from rcmstr_fast.evaluation.network_files import load_segmenter
from rcmstr_fast.evaluation.segment import segment
from rcmstr_fast.evaluation.segment_data import PairFeed, PairImages, open_pairs
from rcmstr_fast.evaluation.segment_report import overlaps, score_masks
from rcmstr_fast.models.segmentation import SegmentationHead
from rcmstr_fast.ops import augment_views
from rcmstr_fast.train.distributed import World
from tests.evaluation.pairs import WIDTH, tiny_segmentation, write_pairs, write_texts


def test_iou_counts_all_pixels_of_a_set():
    truth = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 1]]], bool)
    predicted = np.array([[[1, 0, 1, 0]], [[0, 0, 0, 1]]], bool)
    found = score_masks(overlaps(predicted, truth))
    assert found.count == 2
    assert found.iou == pytest.approx(2 / 4)
    assert found.mean_iou == pytest.approx((2 / 4 + 4 / 6) / 2)
    nothing = np.zeros((1, 2, 2), bool)
    assert score_masks(overlaps(nothing, nothing)).iou == 1.0


@pytest.mark.parametrize("frames, tokens", [(False, 8 * 32), (True, 26)])
def test_head_puts_each_token_in_its_place(frames, tokens):
    width = 100 if frames else 128
    head = SegmentationHead(12, (32, width), frames=frames, dim=8, blocks=1, heads=2)
    head.blocks, head.norm = torch.nn.Identity(), torch.nn.Identity()  # no exchange between tokens
    with torch.no_grad():
        head.pixels.bias.zero_()
        for token in (0, 9, tokens - 1):
            changed = torch.zeros(1, tokens, 12)
            base = head(changed)
            changed[0, token] = 1.0
            where = (head(changed) != base)[0].nonzero()
            low, high = where.min(0).values.tolist(), where.max(0).values.tolist()
            if frames:  # frame t touches columns t - 1 and t
                assert low == [0, 4 * max(token - 1, 0)] and high == [31, min(4 * token + 3, width - 1)]
            else:
                y, x = divmod(token, 32)
                assert low == [4 * y, 4 * x] and high == [4 * y + 3, 4 * x + 3]


def test_masks_move_as_their_pictures(tmp_path):
    pairs = open_pairs([write_pairs(tmp_path / "p", 8)], "train")
    assert pairs.labels == ["word"] * 8

    class Sees(torch.nn.Module):
        size = (32, WIDTH)

        def views(self, pictures, *, seed, epoch, index, preset):
            return augment_views(
                pictures, seed=seed, epoch=epoch, index=index, num_views=1, size=self.size, preset=preset
            )[0]

        def frames(self, views):
            return views

    images = PairImages(pairs, (32, WIDTH), _Now(), 1.0)
    feed = PairFeed(Sees(), images, World(torch.device("cpu")), preset="light", seed=3)
    where = np.arange(8)
    loaded = feed.load(where)
    views = feed.frames(where, loaded, 2, where)
    masks = feed.targets(where, loaded, 2, where, range(8))
    plain = (torch.from_numpy(loaded[..., 3]) > 0).float()
    assert (masks != plain).any()  # crops have moved something
    dark = views.mean(1)
    inside = (dark * masks).sum((1, 2)) / masks.sum((1, 2))
    outside = (dark * (1 - masks)).sum((1, 2)) / (1 - masks).sum((1, 2))
    assert (outside - inside > 0.3).all()
    assert torch.equal(feed.targets(where, loaded, 2, where, [5]), masks[5:6])


class _Now:
    """An executor that works at once."""

    def map(self, function, items):
        return map(function, items)


def test_unusable_pairs_are_counted_and_named(tmp_path, caplog):
    root = tmp_path / "p"
    write_pairs(root, 6)
    Image.new("L", (9, 9), 255).save(root / "masks/0.png")
    (root / "masks/1.png").unlink()
    (root / "images/2.png").write_bytes(b"no picture")
    Image.new("L", (9, 9)).save(root / "images/loose.png")
    with open(root / "pairs.tsv", "a") as file:
        file.write("images/3.png\n../x.png\tmasks/3.png\n")
    pairs = open_pairs([str(root)], "train")
    assert pairs.records.tolist() == [3, 4, 5]
    assert pairs.dropped == {
        "masks of another size than their pictures": 1,
        "masks missing": 1,
        "pictures unreadable": 1,
        "lines that are not 'picture TAB mask' below the folder": 2,
        "pictures without a line in pairs.tsv": 1,
    }
    assert pairs.total == 9 and "6 of 9 pairs are left out" in caplog.text and "0.png" in caplog.text


def test_sets_without_use_are_refused_before_anything_is_written(tmp_path):
    blank = tmp_path / "blank"
    write_pairs(blank, 2)
    for i in range(2):
        Image.new("L", (WIDTH, 32)).save(blank / f"masks/{i}.png")
    empty = tmp_path / "empty"
    write_pairs(empty, 0)
    for train, message in (
        (blank, "none of the 2 masks of .* has text"),
        (empty, "must hold pictures with masks, got none"),
        (tmp_path / "no", "must name folders with pairs.tsv"),
    ):
        with pytest.raises(ConfigError, match=message):
            segment(tiny_segmentation(tmp_path, train=[str(train)]))
    with pytest.raises(ConfigError, match="train and test bars must be different"):
        segment(tiny_segmentation(tmp_path, train=[str(tmp_path / "test")]))
    with pytest.raises(ConfigError, match="dim must be a multiple of heads"):
        segment(tiny_segmentation(tmp_path, dim=15))
    assert not (tmp_path / "run/config.yaml").exists()


def test_run_learns_and_is_continued_exactly(tmp_path, monkeypatch):
    result = segment(tiny_segmentation(tmp_path, mode="finetune", augment="light", lr=0.01))
    run = tmp_path / "run"
    held = json.loads((run / "results.json").read_text())
    (found,) = held["sets"]
    assert found["set"] == "bars" and found["total"] == found["score"]["count"] == 6
    assert 0 <= found["score"]["iou"] <= found["score"]["mean_iou"] + 0.5 <= 1.5
    assert (
        held["info"]["mode"] == "finetune"
        and segment(tiny_segmentation(tmp_path, mode="finetune", augment="light", lr=0.01)) == result
    )
    for name in ("table.md", "results.csv", "segments.png", "predictions/bars.tsv", "words.json"):
        assert (run / name).stat().st_size > 0, name
    network, facts = load_segmenter(run)
    assert facts == result.info and network.size == (32, WIDTH)

    whole = Fit._update

    def dies(self, *arguments):
        whole(self, *arguments)
        if self.step == 4:
            raise RunError("gone")

    changes = {"run": str(tmp_path / "again"), "mode": "finetune", "augment": "light", "lr": 0.01}
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_update", dies)
        with pytest.raises(RunError, match="gone"):
            segment(tiny_segmentation(tmp_path, **changes))
    again = segment(tiny_segmentation(tmp_path, **changes))
    assert again.sets == result.sets
    for one, other in zip(network.state_dict().values(), load_segmenter(tmp_path / "again")[0].state_dict().values()):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_it_learns_where_the_text_is(tmp_path):
    """All background has an IoU of 0, an untrained head about the share of the text, a sixth."""
    train, test = write_texts(tmp_path / "texts", 96, 1), write_texts(tmp_path / "others", 24, 2)
    model = ModelConfig(encoder="vit_tiny", depth=1, image_width=40)
    fields = dict(
        mode="finetune",
        model=model,
        train=[train],
        test=[f"words={test}"],
        batch_size=16,
        dim=32,
        eval_every=1000,
    )
    found = {}
    for name, steps, rate in (("untrained", 1, 1e-9), ("trained", 120, 2e-3)):
        made = segment(tiny_segmentation(tmp_path, run=str(tmp_path / name), steps=steps, lr=rate, **fields))
        found[name] = made.sets[0].score.iou
    assert found["untrained"] < 0.3 and found["trained"] > 0.6, found
