"""Warnings about settings that do nothing, or seldom what was meant."""

import pytest

from rcmstr_fast.config import PretrainConfig, resolve
from rcmstr_fast.methods import every_method, find
from rcmstr_fast.train.advice import Setting, warnings
from rcmstr_fast.train.plan import make_plan
from tests.train.toy import toy_config


def told(images=10_000, epoch_size=10_000, processes=1, **fields) -> list[str]:
    sensible = {"train__steps": 1000, "train__global_batch_size": 100, "method__queue_size": 65536}
    name = fields.pop("method__name", "rcmstr")
    fields = {k: v for k, v in (sensible | fields).items() if k != "method__queue_size" or v is not None}
    config = resolve(toy_config("x", find(name).config(), **fields))
    plan = make_plan(config, epoch_size, processes)
    return warnings(Setting(config, plan, images, processes))


@pytest.mark.parametrize("name", [spec.name for spec in every_method()])
@pytest.mark.parametrize("preset", ["paper", "rclstr_code", "fast"])
@pytest.mark.parametrize("encoder", ["resnet29", "vit_tiny"])
def test_sensible_settings_need_no_words(name, preset, encoder):
    if encoder not in find(name).encoders:
        pytest.skip(f"{name} does not serve {encoder}")
    fields = {"train__global_batch_size": None, "train__steps": 0, "preset": preset, "model__encoder": encoder}
    queue = {} if hasattr(find(name).config(), "queue_size") else {"method__queue_size": None}
    assert told(1_000_000, 1_000_000, method__name=name, **fields, **queue) == []


def test_defaults_need_no_words():
    config = resolve(PretrainConfig(method=find("rcmstr").config()))
    assert warnings(Setting(config, make_plan(config, 1_000_000, 1), 1_000_000, 1)) == []


IBOT, MASKOCR = (
    {"method__name": x, "method__queue_size": None, "model__encoder": "vit_tiny"} for x in ("ibot", "maskocr")
)
SIMAN = {"method__name": "siman", "method__queue_size": None}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optim__warmup_steps": 1000}, "optim.warmup_steps=1000 takes the whole run of 1000 steps"),
        ({"method__queue_size": 5000}, "method.queue_size=5000 is refilled in 1.9 steps at the frame level (2600 keys"),
        (
            {"method__queue_size": 900, "method__levels": ["word"], "method__inter": "none"},
            "more than a tenth of method.qu",
        ),
        ({"images": 60, "epoch_size": 200}, "more than the 60 images of the data: a step shows the same image more"),
        ({"images": 190, "epoch_size": 190}, "each epoch leaves out 90 of its 190 images"),
        (
            {"method__bn_shuffle": True},
            "method.bn_shuffle does nothing here: method.bn_group_size=0 makes one group of",
        ),
        ({"method__bn_shuffle": True, "method__bn_group_size": 100}, "one group of the 100 images of a pass"),
        (
            {"method__permute": False, "method__num_patches": 13},
            "method.num_patches does nothing here: method.permute=f",
        ),
        ({"method__inter": "none", "method__inter_weight": 2.0}, "method.inter_weight does nothing here"),
        ({"method__kl": False, "method__alpha": 0.5}, "method.alpha does nothing here: method.kl=false"),
        ({"model__encoder": "vit_tiny", "model__width": 0.5}, "model.width does nothing here"),
        ({"model__encoder": "vit_tiny", "method__mask_rule": "any"}, "a ViT masks its tokens"),
        ({"model__depth": 6}, "model.depth does nothing here: resnet29 has a depth of its own"),
        ({"model__tps_checkpoint": "x"}, "model.tps_checkpoint does nothing here"),
        ({"optim__sgd_momentum": 0.5}, "optim.sgd_momentum does nothing here: optim.name=adamw"),
        ({"optim__name": "sgd", "optim__beta1": 0.5}, "optim.beta1 does nothing here: optim.name=sgd"),
        ({"optim__schedule": "constant", "optim__min_lr": 1e-4}, "optim.min_lr does nothing here"),
        ({"train__epochs": 3}, "train.epochs does nothing here: train.steps decides"),
        ({"model__tps_align_corners": True}, "model.tps_align_corners does nothing here: model.tps=none"),
        ({"model__sequence_units": 64}, "model.sequence_units does nothing here: model.sequence=none"),
        ({"train__probe_words": 90}, "train.probe_words does nothing here: train.probe_every=0"),
        (IBOT | {"method__local_area": 0.2}, "method.local_area does nothing here: method.local_crops=0"),
        (IBOT | {"method__tau_rise": 0.0, "method__tau_patch_start": 0.05}, "method.tau_patch_start does nothing here"),
        (MASKOCR | {"method__language_layers": 2}, "method.language_layers does nothing here: method.language=false"),
        (SIMAN | {"method__adversarial_weight": 0.0, "method__discriminator_width": 8}, "method.adversarial_weight=0"),
        ({"method__queue": "sharded"}, "method.queue does nothing here: there is one process"),
    ],
)
def test_each_warning(fields, words):
    lines = told(**fields)
    assert len(lines) == 1 or "tenth" in " ".join(lines), lines
    assert any(words in line for line in lines), lines
