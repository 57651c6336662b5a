import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rcmstr_fast import models, ops
from rcmstr_fast.config import ModelConfig
from rcmstr_fast.models.batch_norm import GroupedBatchNorm, set_bn_groups
from rcmstr_fast.models.mim_head import ConvNeXtBlock, FrameMIMHead, TokenMIMHead, unpatchify
from rcmstr_fast.models.projector import BiLSTMProjector, MLPHead

CNN = ModelConfig(width=0.25, projector_hidden=16)
VIT = ModelConfig(encoder="vit_tiny", depth=1, projector_hidden=24)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_bilstm_projector():
    projector = BiLSTMProjector(512, 256)
    assert parameters(projector) == 2_892_288 and projector.out_dim == 256
    assert BiLSTMProjector(8, 6)(torch.randn(2, 26, 8)).shape == (2, 26, 6)


def test_mlp_heads_of_the_vit():
    projector = models.build_projector(ModelConfig(encoder="vit_small"), 384)
    predictor = models.build_predictor(ModelConfig(encoder="vit_small"))
    for head, n_in in ((projector, 384), (predictor, 256)):
        assert head.out_dim == 256
        assert parameters(head) == n_in * 4096 + 4096 * 4096 + 4096 * 256 + 2 * 2 * 4096
        norms = [m for m in head.modules() if isinstance(m, GroupedBatchNorm)]
        assert [norm.affine for norm in norms] == [True, True, False]


def test_mlp_head_takes_its_statistics_over_the_rows_of_a_group():
    torch.manual_seed(0)
    head = MLPHead(6, 10, 4)
    frames = torch.randn(6, 5, 6)
    set_bn_groups(head, 2)
    rows = head(frames).view(3, 10, 4)
    torch.testing.assert_close(rows.mean(1), torch.zeros(3, 4), rtol=0, atol=1e-5)
    set_bn_groups(head, 0)
    torch.testing.assert_close(head(frames).mean((0, 1)), torch.zeros(4), rtol=0, atol=1e-5)


def test_unpatchify_inverts_cutting():
    images = torch.randn(2, 3, 32, 100)
    for height in (4, 32):
        patches = F.unfold(images, (height, 4), stride=(height, 4)).transpose(1, 2)
        assert torch.equal(unpatchify(patches, (32, 100)), images)


def test_convnext_block_computes_its_formula():
    block = ConvNeXtBlock(4).double()
    frames = torch.randn(1, 9, 4, dtype=torch.float64)
    padded = F.pad(frames, (0, 0, 3, 3))
    taps = block.depthwise.weight[:, 0]
    mixed = sum(padded[:, k : k + 9] * taps[:, k] for k in range(7)) + block.depthwise.bias
    expected = frames + block.mlp.fc2(
        F.gelu(block.mlp.fc1(F.layer_norm(mixed, (4,), block.norm.weight, block.norm.bias, 1e-6)))
    )
    torch.testing.assert_close(block(frames), expected)


def test_frame_head_ignores_inactive_features_and_averages_columns():
    torch.manual_seed(0)
    head = FrameMIMHead(8, (32, 100)).double()
    features, active = torch.randn(2, 26, 8, dtype=torch.float64), torch.rand(2, 26) < 0.5
    got = head(features, active)
    assert got.shape == (2, 3, 32, 100)
    assert torch.equal(got, head(features.masked_fill(~active[:, :, None], 7.0), active))
    x = head.block(torch.where(active[:, :, None], head.embed(features), head.mask_token))
    frames = head.pixels(x)
    columns = (frames[:, :-1] + frames[:, 1:]) / 2
    expected = columns.view(2, 25, 3, 32, 4).permute(0, 2, 3, 1, 4).reshape(2, 3, 32, 100)
    torch.testing.assert_close(got, expected)


def test_token_head_has_the_layers_of_the_specification():
    head = TokenMIMHead(384, (32, 128))
    assert parameters(head) == 384 * 192 + 192 * 192 + 2 * 192 + 192 * 48 + 48
    assert head(torch.randn(2, 256, 384)).shape == (2, 3, 32, 128)


@pytest.mark.parametrize("config", [CNN, VIT], ids=["cnn", "vit"])
def test_networks_fit_together(config):
    torch.manual_seed(0)
    encoder = models.build_encoder(config)
    size = 32, config.image_width
    masks = ops.draw_masks(
        torch.arange(4),
        seed=0,
        epoch=0,
        size=size,
        unit=encoder.mask_unit("stage3"),
        mask_ratio=0.7,
        num_blocks=1,
    )
    projector, predictor = models.build_projector(config, encoder.out_channels), models.build_predictor(config)
    head = models.build_mim_head(config, encoder)
    images = torch.randn(4, 3, *size)
    frames = encoder(images)
    projected = projector(frames)
    for rows in ops.hierarchical_pool(projected, 4):
        assert predictor(rows).shape == (4, rows.shape[1], config.feature_dim) == (*rows.shape[:2], predictor.out_dim)
    features, active = encoder.forward_masked(images, masks, "anchored")
    assert encoder.masked_frames(features).shape == frames.shape
    prediction = head(features, active)
    assert prediction.shape == images.shape
    (ops.masked_mse(prediction, images, masks.pixels) + predictor(projected).square().mean()).backward()
    for module in (encoder, projector, predictor, head):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("config", [CNN, VIT], ids=["cnn", "vit"])
def test_state_dict_round_trip(config):
    torch.manual_seed(0)
    first, second = (models.build_encoder(config) for _ in range(2))
    images = torch.randn(2, 3, 32, config.image_width)
    first(images)
    assert not torch.equal(first.eval()(images), second.eval()(images))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images), second(images))


def test_builders_fill_in_the_sizes_that_the_encoder_decides():
    config = ModelConfig(encoder="vit_tiny", depth=1)
    assert models.build_encoder(config).size == (32, 128) and config.feature_dim == 256
    assert models.build_predictor(ModelConfig()).linear.weight.shape == (128, 256)
