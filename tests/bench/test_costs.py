"""Operations and bytes of a step: sizes the networks are known for, the masked share, what each switch removes."""

from collections import defaultdict

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rcmstr_fast.config import PretrainConfig, resolve
from rcmstr_fast.measure.ceilings import Ceilings, measure_ceilings
from rcmstr_fast.measure.costs import PARTS, encoder_products, masked_products, step_works
from rcmstr_fast.methods import settings
from rcmstr_fast.models import build_encoder
from rcmstr_fast.models.vit import Attention
from tests.bench.tiny import CPU, tiny


def full(encoder="resnet29", **method):
    config = PretrainConfig(method=settings(method.pop("name", "rcmstr"), **method))
    config.model.encoder, config.train.global_batch_size = encoder, 512
    return resolve(config)


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
    assert {product.share for product in masked_products(full(mask_ratio=0.0, num_blocks=0))} == {1.0}
    assert {product.share for product in masked_products(full(mask_ratio=1.0))} == {0.0}
    shares = [product.share for product in masked_products(full())]
    assert all(0.0 < share < 0.6 for share in shares) and min(shares) < 0.15  # of 30 % few have all neighbours
    assert {product.share for product in masked_products(full("vit_small"))} == {1.0}


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
