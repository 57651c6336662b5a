"""Operations and bytes of a step: sizes the networks are known for, the masked share, what each switch removes."""

from collections import defaultdict

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rcmstr_fast.config import PretrainConfig, resolve
from rcmstr_fast.measure.ceilings import Ceilings, measure_ceilings
from rcmstr_fast.methods import settings
from rcmstr_fast.methods.costs import PARTS, encoder_passes, encoder_products, pass_products, step_works
from rcmstr_fast.models import build_encoder
from rcmstr_fast.models.transformer import Attention
from rcmstr_fast.train.utilisation import images_per_s_at_peak, peak
from tests.bench.tiny import CPU, tiny


def full(encoder="resnet29", **method):
    config = PretrainConfig(method=settings(method.pop("name", "rcmstr"), **method))
    config.model.encoder, config.train.global_batch_size = encoder, 512
    return resolve(config)


def masked_pass(config):
    (one,) = (one for one in encoder_passes(config) if one.hidden is not None)
    return pass_products(config, one)


def by_part(works):
    flops, moved = defaultdict(float), defaultdict(float)
    for work in works:
        flops[work.part] += work.flop
        moved[work.part] += work.bytes
    return flops, moved


@pytest.mark.parametrize(("encoder", "gmac"), [("resnet29", 5.05), ("vit_small", 6.04)])
def test_multiply_adds_of_the_encoders(encoder, gmac):
    assert sum(product.flop for product, _ in encoder_products(full(encoder))) == pytest.approx(2e9 * gmac, rel=2e-3)


@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_products_are_those_that_torch_counts(encoder):
    config = tiny(encoder)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_encoder(config.model).eval()(torch.rand(1, 3, 32, config.model.image_width))
    found = [p.flop for p, layer in encoder_products(config) if not isinstance(layer, Attention)]  # torch leaves it out
    assert counter.get_total_flops() == pytest.approx(sum(found), rel=1e-6)


def test_attention_is_scores_and_sums():
    config = tiny("vit_tiny")
    (attention,) = (p.flop for p, layer in encoder_products(config) if isinstance(layer, Attention))
    assert attention == 2 * 2 * 256 * 256 * 192


def test_a_step_at_the_training_size():
    flops, moved = by_part(step_works(full(), 512, "bf16"))
    assert set(flops) == set(PARTS)
    assert flops["products"] / 1e12 == pytest.approx(7 * 5.17, rel=0.01)  # two trained passes and the key's forward
    assert flops["loss"] == pytest.approx(2 * 512 * 65536 * 128 * (31 * 5 + 56 + 9))
    assert 0.05 < flops["masked pass"] / flops["products"] * 7 / 3 < 0.2  # of a dense pass
    assert moved["update"] > 36 * 47e6 and flops["update"] == 0
    assert 40 < Ceilings(790e12, 4.3e12, "").ms(step_works(full(), 512, "bf16")) < 75


def test_hidden_sites_are_not_counted():
    assert {product.share for product in masked_pass(full(mask_ratio=0.0, num_blocks=0))} == {1.0}
    assert {product.share for product in masked_pass(full(mask_ratio=1.0))} == {0.0}
    shares = [product.share for product in masked_pass(full())]
    assert all(0.0 < share < 0.6 for share in shares) and min(shares) < 0.15  # of 30 % few have all neighbours
    assert {product.share for product in masked_pass(full("vit_small"))} == {1.0}


#: method, encoder -> passes of an image in units of one dense pass with both gradients
PASSES = {
    ("simclr", "resnet29"): 2,
    ("seqclr", "vit_small"): 2,
    ("supervised", "vit_small"): 1,
    ("persec", "resnet29"): 2,
    ("siman", "resnet29"): 2,
    ("rotnet", "vit_small"): 4,
    ("simmim", "vit_small"): 1,
    ("dig", "vit_small"): 2 + 2 / 3,
    ("ibot", "vit_small"): 2 + 2 / 3,
    ("seqmoco", "vit_small"): 1 + 1 / 3,
    ("rclstr", "resnet29"): 2 + 1 / 3,
}


@pytest.mark.parametrize(("name", "encoder"), PASSES)
def test_passes_of_other_methods(name, encoder):
    """The first layer has no gradient of its input, so that a trained pass is a little less than three."""
    config = full(encoder, name=name)
    dense = sum(product.flop for product, _ in encoder_products(config))
    flops, _ = by_part(step_works(config, 1, "bf16"))
    assert (flops["products"] + flops["masked pass"]) / (3 * dense) == pytest.approx(PASSES[name, encoder], rel=0.02)


def test_passes_over_a_part_of_the_picture():
    """MaskOCR's ViT encodes three tenths with gradient and seven without; attention takes the squares of the shares."""
    config = full("vit_small", name="maskocr")
    seen, rest = encoder_passes(config)
    assert (seen.trained, rest.trained) == (True, False) and seen.share + rest.share == pytest.approx(1)
    for (_, layer), part in zip(encoder_products(config), pass_products(config, seen), strict=True):
        assert part.share == pytest.approx(seen.share ** (2 if isinstance(layer, Attention) else 1))
    masked, whole = encoder_passes(full(name="simmim"))
    assert (
        masked.hidden is not None
        and not whole.trained
        and encoder_passes(full("vit_small", name="simmim")) == (masked,)
    )


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "unknown"])
def test_mfu_is_the_share_of_the_data_sheet(monkeypatch, name):
    """At the images a second that it gives, the operations of the images are those of the sheet."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    config, gpu = full(), torch.device("cuda")
    rate = images_per_s_at_peak(config, gpu, True)
    if name == "unknown":
        assert rate is None
        return
    assert rate * sum(w.flop for w in step_works(config, 1, "bf16")) == pytest.approx(peak(name).sheet)
    assert images_per_s_at_peak(config, gpu, False) is None and images_per_s_at_peak(config, CPU, True) is None


def test_switches_remove_work():
    flops, _ = by_part(step_works(full(), 512, "bf16"))
    contrastive, _ = by_part(step_works(full(name="rclstr"), 512, "bf16"))
    simple, _ = by_part(step_works(full(name="seqmoco", kl=False), 512, "bf16"))
    assert contrastive["products"] == flops["products"] and "masked pass" not in contrastive
    assert simple["products"] == pytest.approx(flops["products"] * 4 / 7, rel=0.01)
    assert simple["loss"] == pytest.approx(2 * 512 * 65536 * 128 * 4 * 2)


def test_ceilings_are_measured_here():
    found = measure_ceilings(CPU, "fp32")
    assert found.flop_per_s > 1e8 and found.bytes_per_s > 1e8 and "in this run" in found.source
