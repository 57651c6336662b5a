"""The contract of the encoders: tokens beside frames, a sequence of their own, a class token, no final norm."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from rcmstr_fast import ops
from rcmstr_fast.config import ModelConfig, PretrainConfig, resolve
from rcmstr_fast.models import build_encoder, build_rectifier
from rcmstr_fast.train.export import export_encoder
from rcmstr_fast.train.exported import load_encoder

CNN = dict(encoder="resnet29", width=0.25)
VIT = dict(encoder="vit_tiny", depth=1)


def built(**fields):
    torch.manual_seed(0)
    return build_encoder(ModelConfig(**fields)).double().eval()


def images_of(encoder, batch=2):
    width = 128 if hasattr(encoder, "grid") else 100
    return torch.randn(batch, 3, 32, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def masks_of(encoder, batch=2):
    token = hasattr(encoder, "grid")
    return ops.draw_masks(
        torch.arange(batch),
        seed=1,
        epoch=0,
        size=(32, 128 if token else 100),
        unit="token" if token else "stage3",
        mask_ratio=0.7,
        num_blocks=1,
    )


@pytest.mark.parametrize(("fields", "tokens", "frames"), [(CNN, (26, 128), (26, 128)), (VIT, (256, 192), (32, 192))])
def test_tokens_and_frames(fields, tokens, frames):
    encoder = built(**fields)
    images = images_of(encoder)
    found = encoder.tokens(images)
    assert found.shape == (2, *tokens) and encoder.token_channels == tokens[1]
    assert encoder(images).shape == (2, *frames) and encoder.out_channels == frames[1]
    torch.testing.assert_close(encoder(images), encoder.masked_frames(found), rtol=0, atol=0)


@pytest.mark.parametrize("fields", [CNN, VIT])
def test_the_sequence_is_two_lstms_over_the_columns(fields):
    """Each layer: torch's own bidirectional LSTM, then its linear map, written out."""
    encoder = built(**fields, sequence="bilstm", sequence_units=8)
    assert encoder.out_channels == 8 and encoder.token_channels in (128, 192)
    images = images_of(encoder)
    rows = encoder.columns(encoder.tokens(images))
    for layer in encoder.sequence:
        plain = nn.LSTM(rows.shape[2], 8, bidirectional=True, batch_first=True).double()
        plain.load_state_dict(layer.rnn.state_dict())
        rows = F.linear(plain(rows)[0], layer.linear.weight, layer.linear.bias)
    torch.testing.assert_close(encoder(images), rows, rtol=0, atol=1e-12)


def test_the_sequence_of_the_paper():
    encoder = build_encoder(ModelConfig(encoder="resnet29", sequence="bilstm"))
    assert [layer.rnn.hidden_size for layer in encoder.sequence] == [256, 256] and encoder.out_channels == 256
    assert sum(p.numel() for p in encoder.sequence.parameters()) == 2_892_288


def test_the_masked_pass_is_that_of_the_tokens():
    """The LSTM comes after it: reconstruction sees V, and the frames of a masked pass go through the LSTM."""
    encoder = built(**CNN, sequence="bilstm", sequence_units=8).train()
    images, masks = images_of(encoder), masks_of(encoder)
    features, active = encoder.forward_masked(images, masks, "anchored")
    assert features.shape == (2, 26, 128) and active.shape == (2, 26)
    assert encoder.masked_frames(features).shape == (2, 26, 8)
    assert (features[~active] == 0).all()


def test_class_token():
    """It stands before the patches, sees all of them, and the tokens come back without it."""
    encoder, plain = built(**VIT, class_token=True), built(**VIT)
    assert {name for name, _ in encoder.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        "cls_token"
    }
    images = images_of(encoder)
    found = encoder.features(images)
    assert found.tokens.shape == (2, 256, 192) and found.class_token.shape == (2, 192)
    assert plain.features(images).class_token is None
    rows = encoder.patch_embed(images) + encoder.pos_embed
    rows = encoder.blocks[0](torch.cat([encoder.cls_token.expand(2, 1, 192), rows], dim=1))
    rows = F.layer_norm(rows, (192,), encoder.norm.weight, encoder.norm.bias, 1e-6)
    torch.testing.assert_close(torch.cat([found.class_token[:, None], found.tokens], dim=1), rows, rtol=0, atol=1e-12)
    masked = encoder.features(images, masks_of(encoder))
    assert masked.tokens.shape == (2, 256, 192) and masked.active is None
    assert not torch.allclose(masked.class_token, found.class_token)
    poisoned = images.masked_fill(masks_of(encoder).pixels, torch.nan)
    torch.testing.assert_close(encoder.features(poisoned, masks_of(encoder)).class_token, masked.class_token)


def test_without_the_final_norm():
    encoder, normed = built(**VIT, final_norm=False), built(**VIT)
    assert not any(name.startswith("norm.") for name in encoder.state_dict())
    tokens = encoder.tokens(images_of(encoder))
    expected = F.layer_norm(tokens, (192,), eps=1e-6)
    torch.testing.assert_close(normed.tokens(images_of(encoder)), expected, rtol=0, atol=1e-12)


def test_the_cnn_has_no_class_token():
    for wrong in ({"class_token": True}, {"final_norm": False}):
        with pytest.raises(ValueError, match="belong to the ViT"):
            build_encoder(ModelConfig(**CNN, **wrong))


def test_align_corners_is_the_sampling_of_dtrb():
    """The grid stays; with align_corners the value 1 means the centre of the last pixel."""
    torch.manual_seed(0)
    ours = build_rectifier(ModelConfig(tps="trainable", tps_align_corners=True)).double().eval()
    nn.init.normal_(ours.fc2.weight, std=0.02)
    images = torch.randn(2, 3, 32, 100, dtype=torch.float64)
    points = ours.fc2(F.relu(ours.fc1(ours.localisation(images)))).view(2, 20, 2)
    grid = (ours.matrix @ points).view(2, 32, 100, 2)
    x, y = (grid[..., 0] + 1) / 2 * 99, (grid[..., 1] + 1) / 2 * 31
    x, y = x.clamp(0, 99), y.clamp(0, 31)
    left, top = x.floor().clamp(max=98), y.floor().clamp(max=30)
    a, b = (x - left)[:, None], (y - top)[:, None]

    def at(dy, dx):
        corners = zip(images, (top + dy).long(), (left + dx).long(), strict=True)
        return torch.stack([image[:, rows, columns] for image, rows, columns in corners])

    expected = (1 - b) * ((1 - a) * at(0, 0) + a * at(0, 1)) + b * ((1 - a) * at(1, 0) + a * at(1, 1))
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-9)
    ours.align_corners = False
    assert not torch.allclose(ours(images), expected, atol=1e-3)


def test_align_corners_by_preset():
    assert resolve(PretrainConfig(preset="rclstr_code", model=ModelConfig(tps="trainable"))).model.tps_align_corners
    assert resolve(PretrainConfig(preset="paper")).model.tps_align_corners is False
    kept = PretrainConfig(preset="rclstr_code", model=ModelConfig(tps_align_corners=False))
    assert resolve(kept).model.tps_align_corners is False


def exported(path, **fields):
    config = resolve(PretrainConfig(model=ModelConfig(**fields)))
    parts = {"encoder": build_encoder(config.model), "rectifier": build_rectifier(config.model)}
    export_encoder(SimpleNamespace(exported=lambda: parts), path, config, 0)
    return parts


@pytest.mark.parametrize(
    "fields",
    [
        CNN | dict(sequence="bilstm", tps="trainable", tps_align_corners=True),
        VIT | dict(class_token=True),
        VIT | dict(final_norm=False, sequence="bilstm"),
    ],
)
def test_export_keeps_every_part(tmp_path, fields):
    parts = exported(tmp_path / "encoder.safetensors", **fields)
    encoder, rectifier, header = load_encoder(tmp_path)
    for name in ("sequence", "class_token", "final_norm", "tps_align_corners"):
        assert header[name] == getattr(resolve(PretrainConfig(model=ModelConfig(**fields))).model, name)
    images = torch.randn(1, 3, 32, header["image_width"])
    with torch.no_grad():
        expected = parts["encoder"].eval()(parts["rectifier"].eval()(images))
        assert torch.equal(encoder(rectifier(images)), expected)
    assert expected.shape[1:] == (header["frames"], header["out_channels"])


def test_files_of_before_these_fields_still_load(tmp_path):
    """An older header has none of the new fields: no sequence, no class token, a final norm, no aligned corners."""
    path = tmp_path / "encoder.safetensors"
    exported(path, **VIT)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["rcmstr_fast"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    new = ("sequence", "sequence_units", "class_token", "final_norm", "tps_align_corners")
    for name in new:
        header["config"]["model"].pop(name)
        header.pop(name, None)
    save_file(tensors, path, {"rcmstr_fast": json.dumps(header)})
    encoder, _, header = load_encoder(path)
    assert encoder.cls_token is None and isinstance(encoder.norm, nn.LayerNorm)
    assert not set(new) & set(header["config"]["model"])
