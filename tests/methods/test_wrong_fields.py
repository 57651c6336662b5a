"""Fields that do not fit a method are refused in one line that names method, field, what was expected and what came."""

import pytest

from rcmstr_fast.cli.main import main
from rcmstr_fast.config import ConfigError, PretrainConfig, resolve
from rcmstr_fast.methods import settings


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("dig", {}, "model.encoder must be one of vit_tiny, vit_small, vit_base for method dig, got 'resnet29'"),
        ("ibot", {}, "model.encoder must be one of vit_tiny, vit_small, vit_base for method ibot, got 'resnet29'"),
        ("seqclr", {"method.windows": 27}, "method.windows must be at most the 26 frames of an image for method seqclr, got 27"),
        ("dig", {"model.encoder": "vit_tiny", "method.windows": 33},
         "method.windows must be at most the 32 frames of an image for method dig, got 33"),
        ("simclr", {"train.global_batch_size": 4, "train.accumulate": 4},
         "train.global_batch_size / train.accumulate must be 2 or more images for method simclr "
         "(the others of a micro-batch are the negatives), got 1"),
        ("persec", {"train.global_batch_size": 4, "train.accumulate": 4},
         "train.global_batch_size / train.accumulate must be 2 or more images for method persec "
         "(the others of a micro-batch are the negatives), got 1"),
        ("simmim", {"model.sequence": "bilstm"}, "model.sequence must be none for method simmim, got 'bilstm'"),
        ("ibot", {"model.encoder": "vit_tiny", "model.sequence": "bilstm"},
         "model.sequence must be none for method ibot, got 'bilstm'"),
        ("ibot", {"model.encoder": "vit_tiny", "method.local_crops": 2, "model.image_width": 100},
         "model.image_width must be a multiple of 8 for method ibot with local_crops, got 100"),
        ("ibot", {"model.encoder": "vit_tiny", "method.mask_ratio": 0.0},
         "method.mask_ratio must be more than 0 and at most 1, got 0.0"),
        ("simclr", {"method.temperature": 0.0}, "method.temperature must be more than 0, got 0.0"),
        ("simclr", {"model.class_token": True}, "model.class_token must be false for a CNN, got True"),
    ],
)  # fmt: skip
def test_one_line(name, changes, line):
    config = PretrainConfig(method=settings(name))
    for dotted, value in changes.items():
        part, field = dotted.split(".")
        setattr(getattr(config, part), field, value)
    with pytest.raises(ConfigError) as caught:
        resolve(config)
    assert str(caught.value).replace("'", "") == line.replace("'", "")


@pytest.mark.parametrize(
    ("name", "field", "words"),
    [
        ("simclr", "queue_size", "method simclr has no field queue_size"),
        ("dig", "queue_size", "method dig has no field queue_size"),
        ("simmim", "momentum", "method simmim has no field momentum"),
        ("seqclr", "window", "did you mean method.windows?"),
    ],
)
def test_a_field_of_another_method(name, field, words, capsys):
    assert main(["pretrain", "--method.name", name, f"--method.{field}", "3"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error
